// What the page draws: the picture with the depths of its patches, and the tokens of each layer.

// Viridis at 12 even steps, dark blue to yellow, as in the project's report page.
const COLOURS = ["#440154", "#482173", "#433e85", "#38588c", "#2d708e", "#25858e", "#1e9b8a", "#2ab07f", "#52c569", "#86d549", "#c2df23", "#fde725"];

/** The colour of a depth from 1 to layers. */
export function colour(depth, layers) {
  return COLOURS[Math.round(((depth - 1) / Math.max(layers - 1, 1)) * (COLOURS.length - 1))];
}

/** Draw the middle square of a picture, and over it the patches that have halted after a layer, with their depth. */
export function drawDepths(canvas, picture, depths, about, layer) {
  const context = canvas.getContext("2d");
  const side = canvas.width;
  context.fillStyle = "black";
  context.fillRect(0, 0, side, side);
  if (!picture) return;
  const square = Math.min(picture.width, picture.height);
  const corner = [(picture.width - square) / 2, (picture.height - square) / 2];
  context.imageSmoothingEnabled = square > 56;
  context.drawImage(asCanvas(picture), ...corner, square, square, 0, 0, side, side);
  const [rows, columns] = about.patches;
  const [height, width] = [side / rows, side / columns];
  context.font = `600 ${Math.round(height * 0.3)}px system-ui, sans-serif`;
  context.textAlign = "right";
  context.textBaseline = "bottom";
  depths.slice(about.special_tokens).forEach((depth, place) => {
    if (depth > layer) return;
    const [x, y] = [(place % columns) * width, Math.floor(place / columns) * height];
    context.globalAlpha = 0.72;
    context.fillStyle = colour(depth, about.layers);
    context.fillRect(x + 1, y + 1, width - 2, height - 2);
    context.globalAlpha = 1;
    context.fillStyle = depth > 0.7 * about.layers ? "#10202c" : "white";
    context.fillText(depth, x + width - 0.09 * width, y + height - 0.05 * height);
  });
}

/** A picture as a canvas of its size. */
export function asCanvas({ pixels, width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  pixels.forEach((value, place) => image.data.set([value, value, value, 255], 4 * place));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** One column for each layer, as many as `about` says. */
export function buildLayers(list, about) {
  list.replaceChildren(
    ...Array.from({ length: about.layers }, (_, place) => {
      const column = document.createElement("li");
      const [count, bar, number] = ["span", "i", "b"].map((kind) => document.createElement(kind));
      bar.style.background = colour(place + 1, about.layers);
      number.textContent = place + 1;
      column.append(count, bar, number);
      return column;
    }),
  );
}

/** The number of tokens that each layer computes. */
export function tokensLeft(depths, layers) {
  return Array.from({ length: layers }, (_, place) => depths.filter((depth) => depth > place).length);
}

/** Show the tokens of the layers up to this one. */
export function drawLayers(list, depths, layers, layer) {
  const counts = tokensLeft(depths, layers);
  [...list.children].forEach((column, place) => {
    const reached = depths.length > 0 && place < layer;
    column.classList.toggle("reached", reached);
    column.style.setProperty("--share", reached ? counts[place] / depths.length : 0);
    column.firstChild.textContent = reached ? counts[place] : "";
  });
}

/** The most probable classes, with bars. */
export function drawClasses(list, probabilities, names, most = 3) {
  const best = probabilities.map((probability, place) => ({ probability, name: names[place] }));
  best.sort((a, b) => b.probability - a.probability);
  list.replaceChildren(
    ...best.slice(0, most).map(({ probability, name }) => {
      const row = document.createElement("li");
      const [label, bar, percent] = ["b", "i", "span"].map((kind) => document.createElement(kind));
      label.textContent = name;
      bar.style.setProperty("--share", probability);
      percent.textContent = `${(100 * probability).toFixed(probability > 0.995 ? 1 : 0)} %`;
      row.append(label, bar, percent);
      return row;
    }),
  );
}
