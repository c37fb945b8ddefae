// Everything comes from the server of this page: the library, its WebAssembly and the models.
import { RawImage, env, pipeline } from "./node_modules/@huggingface/transformers/dist/transformers.min.js";

const ROUNDS = 20;
const LISTED = 10; // classes that pointing at an answer shows
const options = new URLSearchParams(location.search);
const names = options.getAll("model").length ? options.getAll("model") : ["whole", "removed"];
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "models/"; // a URL would count as another machine
env.useBrowserCache = false; // or a model that was exported again would stay the old one
env.backends.onnx.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", location.href).href;

const canvas = document.getElementById("picture");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const say = (text) => (document.getElementById("status").textContent = text);
let picture = canvas; // or the one that was dropped, in its own size

function clear() {
  picture = canvas;
  pen.fillStyle = "black";
  pen.fillRect(0, 0, canvas.width, canvas.height);
}

// Smoothed while it gets smaller, as in Python; the library's own resizing in a browser would skip most pixels.
async function pictureFor({ processor: { image_processor } }) {
  const { width, height, shortest_edge } = image_processor.size ?? picture;
  const small = new OffscreenCanvas(width ?? shortest_edge, height ?? shortest_edge);
  const options = { resizeWidth: small.width, resizeHeight: small.height, resizeQuality: "high" };
  small.getContext("2d").drawImage(await createImageBitmap(picture, options), 0, 0);
  return RawImage.fromCanvas(small);
}

// Runs take turns, so that whatever else the machine does hits both models alike.
async function classify(models) {
  const small = await pictureFor(models[names[0]]);
  const answers = {};
  const times = Object.fromEntries(names.map((name) => [name, []]));
  for (let round = 0; round <= ROUNDS; round++) {
    for (const name of names) {
      const start = performance.now();
      answers[name] = await models[name](small, { top_k: LISTED });
      if (round) times[name].push(performance.now() - start); // the first warms up
    }
  }
  document.getElementById("answers").replaceChildren(
    ...names.map((name) => {
      const [{ label, score }] = answers[name];
      const median = times[name].sort((a, b) => a - b)[ROUNDS / 2];
      const row = document.createElement("tr");
      row.title = answers[name].map(({ label, score }) => `${label}: ${score.toFixed(6)}`).join("\n");
      for (const text of [name, `${label} (${score.toFixed(3)})`, median.toFixed(2)])
        row.appendChild(document.createElement("td")).textContent = text;
      return row;
    }),
  );
  say("Ready.");
}

function drawWith(classifyPicture) {
  let last = null;
  const place = ({ offsetX, offsetY }) => [offsetX, offsetY];
  canvas.addEventListener("pointerdown", (event) => {
    picture = canvas;
    last = place(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    Object.assign(pen, { strokeStyle: "white", lineWidth: canvas.width / 9, lineCap: "round" });
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...(last = place(event)));
    pen.stroke();
  });
  window.addEventListener("pointerup", () => {
    if (last) classifyPicture();
    last = null;
  });
  canvas.addEventListener("dragover", (event) => event.preventDefault());
  canvas.addEventListener("drop", async (event) => {
    event.preventDefault();
    picture = await createImageBitmap(event.dataTransfer.files[0]);
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    classifyPicture();
  });
  document.getElementById("clear").addEventListener("click", clear);
}

clear();
try {
  const dtype = options.get("dtype") ?? "fp32";
  const models = {};
  for (const name of names) models[name] = await pipeline("image-classification", name, { dtype, device: "wasm" });
  const run = () => classify(models).catch((error) => say(String(error)));
  drawWith(run);
  say("Ready.");
} catch (error) {
  say(String(error));
}
