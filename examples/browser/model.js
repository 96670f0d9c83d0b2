// The models in ONNX Runtime Web: one thread of WebAssembly, and no file but those beside this page.

const RUNTIME = "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
let runtime;

/** What models.json says about each model. Throws an Error to show. */
export async function readModels() {
  try {
    runtime = await import(RUNTIME);
  } catch {
    throw new Error("ONNX Runtime Web is missing: run npm ci in examples/browser, then load this page again.");
  }
  runtime.env.wasm.numThreads = 1; // more need headers that a plain local server does not send
  const answer = await fetch("models/models.json");
  if (!answer.ok) throw new Error("The models are missing: run python examples/browser/prepare.py, then load this page again.");
  return answer.json();
}

/** The A-ViT and the dense model of a name. */
export async function openModels(name) {
  const open = async (file) => {
    try {
      return await runtime.InferenceSession.create(`models/${file}.onnx`, { executionProviders: ["wasm"] });
    } catch (error) {
      throw new Error(`models/${file}.onnx does not load (${error.message}): run python examples/browser/prepare.py again.`);
    }
  };
  return { adaptive: await open(name), dense: await open(`${name}_dense`) };
}

/** A picture as the models' input. */
export function inputOf({ pixels, width, height }) {
  return { pictures: new runtime.Tensor("uint8", pixels, [1, height, width, 1]) };
}

/** Probabilities [classes] and token depths [tokens] of a picture. */
export async function predict(session, input) {
  const { logits, token_depth } = await session.run(input);
  const values = Array.from(logits.data);
  const highest = Math.max(...values);
  const powers = values.map((value) => Math.exp(value - highest));
  const sum = powers.reduce((a, b) => a + b);
  return { logits: values, probabilities: powers.map((power) => power / sum), depths: Array.from(token_depth.data) };
}

const MOST_ROUNDS = 25;
const FEWEST_ROUNDS = 5;
const MILLISECONDS = 1500; // after which there are no more rounds than the fewest
const RUNS = 3; // in a round; browsers give no time finer than 0.1 to 1 ms

/** Median milliseconds of each session, measured in turn, and rounds; null when goesOn() ends it. The page can move. */
export async function measure(sessions, input, goesOn) {
  const times = sessions.map(() => []);
  const began = performance.now();
  let rounds = -1; // the first one warms up
  while (rounds < FEWEST_ROUNDS || (rounds < MOST_ROUNDS && performance.now() - began < MILLISECONDS)) {
    for (const [place, session] of sessions.entries()) {
      await new Promise((resolve) => setTimeout(resolve));
      if (!goesOn()) return null;
      const start = performance.now();
      for (let run = 0; run < RUNS; run++) await session.run(input);
      if (rounds >= 0) times[place].push((performance.now() - start) / RUNS);
    }
    rounds++;
  }
  return { rounds, medians: times.map((each) => each.sort((a, b) => a - b)[each.length >> 1]) };
}
