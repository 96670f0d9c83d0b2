// A picture file as the model takes it: grey, bright things on a dark ground.

const SHORTER = 256; // pixels; the model sees 28, and its file does the rest of the shrinking
const LONGER = 1024;
const LARGEST = 50e6; // bytes

/** The grey picture in a file or in a part of an image. part: [left, top, width, height]. Throws an Error to show. */
export async function pictureIn(source, name, part = []) {
  if (source instanceof Blob && source.size > LARGEST) {
    throw new Error(`${name} has ${Math.round(source.size / 1e6)} MB: drop a picture below ${LARGEST / 1e6} MB.`);
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(source, ...part);
  } catch {
    throw new Error(`${name} is no picture that this browser can read: drop a PNG, JPEG or WebP file.`);
  }
  const shrink = Math.min(1, SHORTER / Math.min(bitmap.width, bitmap.height), LONGER / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * shrink)));
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  return darkGround({ pixels: grey(context.getImageData(0, 0, width, height).data), width, height });
}

// Pillow's rounding of ITU-R 601 luma, so that Python sees the same levels.
function grey(data) {
  const pixels = new Uint8Array(data.length / 4);
  for (let place = 0; place < pixels.length; place++) {
    const [red, green, blue] = data.subarray(4 * place, 4 * place + 3);
    pixels[place] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;
  }
  return pixels;
}

// The models learned from bright things on black. A picture with a bright border is turned into its negative.
function darkGround(picture) {
  const { pixels, width, height } = picture;
  let [sum, count] = [0, 0];
  pixels.forEach((value, place) => {
    const [x, y] = [place % width, Math.floor(place / width)];
    if (x && y && x < width - 1 && y < height - 1) return;
    sum += value;
    count++;
  });
  return sum / count <= 127 ? picture : { ...picture, pixels: pixels.map((value) => 255 - value), negative: true };
}
