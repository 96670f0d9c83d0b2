// The page: what is drawn or dropped goes through the model, and its tokens are shown.

import { pictureOf } from "./digit.js";
import { inputOf, measure, openModels, predict, readModels } from "./model.js";
import { pictureIn } from "./picture.js";
import { asCanvas, buildLayers, colour, drawClasses, drawDepths, drawLayers } from "./show.js";

const part = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const PEN = 0.075; // of the side of the drawing
const LAYER_MILLISECONDS = 110;

let models; // what models.json says
let name; // of the model in use
let sessions = {}; // by name; those of a model open when it is first chosen
let strokes = [];
let picture = null; // what the model sees
let shown = null; // what it answered
let turn = 0; // counts pictures; work for an older one ends
let playing = 0; // counts plays of the layers; an older one ends
let running = false;

start().catch(fail);

async function start() {
  models = await readModels();
  listen();
  await choose("digits");
}

function fail(error) {
  part.state.textContent = error.message;
  part.state.classList.add("failed");
  document.body.dataset.state = "failed";
}

function say(text) {
  part.state.textContent = text;
  part.state.classList.remove("failed");
}

async function choose(chosen) {
  name = chosen;
  for (const button of document.querySelectorAll("[data-model]")) {
    button.setAttribute("aria-pressed", button.dataset.model === chosen);
  }
  document.body.dataset.model = chosen;
  document.body.dataset.state = "loading";
  const about = models[name];
  buildLayers(part.layers, about);
  part.layer.max = part.layer.value = about.layers;
  part.scale.replaceChildren(
    ...Array.from({ length: about.layers }, (_, place) => {
      const step = document.createElement("i");
      step.style.background = colour(place + 1, about.layers);
      return step;
    }),
  );
  buildExamples();
  clear();
  say("Loading the model …");
  sessions[name] ??= openModels(name);
  try {
    await sessions[name];
  } catch (error) {
    sessions[name] = undefined;
    throw error;
  }
  if (name !== chosen) return;
  say(name === "digits" ? "Draw a digit, or take an example." : "Take an example, or drop a picture of one thing.");
  document.body.dataset.state = "ready";
}

function clear() {
  turn++;
  strokes = [];
  picture = shown = null;
  part.answer.textContent = "–";
  part.classes.replaceChildren();
  part.work.textContent = part.speed.textContent = "";
  part.adaptive.textContent = part.dense.textContent = part.times.textContent = "–";
  part.pad.getContext("2d").clearRect(0, 0, part.pad.width, part.pad.height);
  part.hint.hidden = name !== "digits";
  show(0);
}

// ---- what comes in

function listen() {
  for (const button of document.querySelectorAll("[data-model]")) {
    button.addEventListener("click", () => choose(button.dataset.model).catch(fail));
  }
  part.clear.addEventListener("click", clear);
  part.play.addEventListener("click", play);
  part.layer.addEventListener("input", () => {
    playing++;
    show(Number(part.layer.value));
  });
  part.file.addEventListener("change", () => take(part.file.files[0]));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  part.pad.addEventListener("pointerdown", (event) => {
    if (name !== "digits") return;
    part.pad.setPointerCapture(event.pointerId);
    if (!strokes.length) clear();
    part.hint.hidden = true;
    strokes.push([]);
    draw(event);
  });
  part.pad.addEventListener("pointermove", (event) => {
    if (part.pad.hasPointerCapture(event.pointerId)) draw(event);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    part.pad.addEventListener(end, () => {
      if (strokes.length) see(pictureOf(strokes), true).catch(fail);
    });
  }
}

function draw(event) {
  const box = part.pad.getBoundingClientRect();
  const moves = event.getCoalescedEvents?.() ?? [];
  for (const { clientX, clientY } of moves.length ? moves : [event]) {
    strokes.at(-1).push([(clientX - box.left) / box.width, (clientY - box.top) / box.height]);
  }
  const context = part.pad.getContext("2d");
  const side = part.pad.width;
  context.clearRect(0, 0, side, side);
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = PEN * side;
  context.strokeStyle = "white";
  for (const stroke of strokes) {
    context.beginPath();
    context.moveTo(stroke[0][0] * side, stroke[0][1] * side);
    for (const [x, y] of stroke) context.lineTo(x * side, y * side);
    context.stroke();
  }
  if (!running) see(pictureOf(strokes), false).catch(fail);
}

function buildExamples() {
  const sheet = `pictures/${name}.png`;
  part.examples.replaceChildren(
    ...models[name].class_names.map((label, place) => {
      const button = document.createElement("button");
      button.style.backgroundImage = `url(${sheet})`;
      button.style.backgroundPosition = `${(100 * place) / 9}% 0`;
      button.setAttribute("aria-label", `Example: ${label}`);
      button.addEventListener("click", async () => {
        const image = new Image();
        image.src = sheet;
        await image.decode();
        takePicture(await pictureIn(image, sheet, [28 * place, 0, 28, 28])).catch(fail);
      });
      return button;
    }),
  );
}

async function take(file) {
  part.file.value = "";
  if (!file) return;
  try {
    const found = await pictureIn(file, file.name);
    await takePicture(found);
    if (found.negative) say("Its border is bright, so the model sees the negative: it learned from dark grounds.");
  } catch (error) {
    part.state.textContent = error.message;
    part.state.classList.add("failed");
  }
}

function takePicture(taken) {
  clear();
  part.hint.hidden = true;
  const square = Math.min(taken.width, taken.height);
  const context = part.pad.getContext("2d");
  context.imageSmoothingEnabled = square > 56;
  const corner = [(taken.width - square) / 2, (taken.height - square) / 2];
  context.drawImage(asCanvas(taken), ...corner, square, square, 0, 0, part.pad.width, part.pad.height);
  return see(taken, true);
}

// ---- what comes out

// finished: the picture will not change any more, so its layers are played and its time is measured.
async function see(seen, finished) {
  const own = ++turn;
  const goesOn = () => own === turn;
  const [about, open] = [models[name], await sessions[name]];
  if (!goesOn() || !open) return;
  const input = inputOf(seen);
  running = true;
  document.body.dataset.state = "running";
  const found = await predict(open.adaptive, input).finally(() => (running = false));
  if (!goesOn()) return;
  [picture, shown] = [seen, found];
  drawClasses(part.classes, found.probabilities, about.class_names);
  const computed = found.depths.reduce((a, b) => a + b) / (found.depths.length * about.layers);
  part.answer.textContent = about.class_names[found.probabilities.indexOf(Math.max(...found.probabilities))];
  part.work.textContent = `${Math.round(100 * computed)} % of all tokens × layers are computed.`;
  say("");
  show(about.layers);
  if (!finished) return;
  const { matches: still } = matchMedia("(prefers-reduced-motion: reduce)");
  if (!still) await play();
  if (!goesOn()) return;
  part.speed.textContent = "measuring …";
  const measured = await measure([open.adaptive, open.dense], input, goesOn);
  if (!measured) return;
  const [ours, dense] = measured.medians;
  [part.adaptive.textContent, part.dense.textContent] = measured.medians.map((time) => `${time.toFixed(1)} ms`);
  part.times.textContent = `${(dense / ours).toFixed(2)} ×`;
  part.speed.textContent = `Medians of ${measured.rounds} rounds, both models in turn, on one thread of this browser.`;
  // For tests: the picture as the model file got it, and what came out.
  window.shown = { model: name, ...seen, pixels: Array.from(seen.pixels), ...found, milliseconds: measured.medians };
  document.body.dataset.state = "done";
}

async function play() {
  const [own, ofTurn] = [++playing, turn];
  for (let layer = 0; layer <= models[name].layers && own === playing && ofTurn === turn; layer++) {
    show(layer);
    await new Promise((resolve) => setTimeout(resolve, LAYER_MILLISECONDS));
  }
}

function show(layer) {
  const about = models[name];
  const depths = shown?.depths ?? [];
  drawDepths(part.map, picture, depths, about, layer);
  drawLayers(part.layers, depths, about.layers, layer);
  part.layer.value = layer;
  part.layer.disabled = part.play.disabled = !shown;
  part.at.textContent = shown ? `after layer ${layer}` : "";
}
