// A drawn digit as a picture like MNIST's: a stroke of even width, 20 of 28 pixels large, its centre of mass in the middle.

const SIDE = 28; // of MNIST's pictures
const BOX = 20; // of the digit in them
const STROKE = 2.4; // width of the pen in them
export const SCALE = 5; // our picture is larger by this; the model file shrinks it as Python would

/** The grey picture of strokes, each a list of [x, y] with sides from 0 to 1. */
export function pictureOf(strokes) {
  const points = strokes.flat();
  const [left, top] = [0, 1].map((axis) => Math.min(...points.map((point) => point[axis])));
  const [right, bottom] = [0, 1].map((axis) => Math.max(...points.map((point) => point[axis])));
  // A dot is not blown up to the size of a digit.
  const zoom = (BOX - STROKE) / Math.max(right - left, bottom - top, 0.2);
  const shift = [SIDE / 2 - (zoom * (left + right)) / 2, SIDE / 2 - (zoom * (top + bottom)) / 2];
  const [x, y] = centreOfMass(rendered(strokes, zoom, shift));
  return rendered(strokes, zoom, [shift[0] + SIDE / 2 - x, shift[1] + SIDE / 2 - y]);
}

function rendered(strokes, zoom, shift) {
  const canvas = new OffscreenCanvas(SIDE * SCALE, SIDE * SCALE);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.scale(SCALE, SCALE);
  context.translate(...shift);
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = STROKE;
  context.strokeStyle = "white";
  for (const stroke of strokes) {
    context.beginPath();
    stroke.forEach(([x, y], place) => (place ? context.lineTo(x * zoom, y * zoom) : context.moveTo(x * zoom, y * zoom)));
    if (stroke.length === 1) context.lineTo(stroke[0][0] * zoom, stroke[0][1] * zoom);
    context.stroke();
  }
  const { data, width, height } = context.getImageData(0, 0, canvas.width, canvas.height);
  const pixels = new Uint8Array(width * height);
  for (let place = 0; place < pixels.length; place++) pixels[place] = data[4 * place + 3];
  return { pixels, width, height };
}

function centreOfMass({ pixels, width }) {
  let [mass, x, y] = [0, 0, 0];
  pixels.forEach((value, place) => {
    mass += value;
    x += value * ((place % width) + 0.5);
    y += value * (Math.floor(place / width) + 0.5);
  });
  return mass ? [x / mass / SCALE, y / mass / SCALE] : [SIDE / 2, SIDE / 2];
}
