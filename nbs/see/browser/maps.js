// Runs a network of models/ on a photograph and draws its attention maps. Every file is in the folder of this page.
import * as ort from "./ort/ort.wasm.min.mjs";

const SIDE = 112; // pixels, what the networks were trained on
const find = (id) => document.getElementById(id);
const sessions = new Map();

async function prepareRuntime() {
  const packed = await fetch("ort/ort-wasm-simd-threaded.wasm.gz");
  const stream = packed.body.pipeThrough(new DecompressionStream("gzip"));
  ort.env.wasm.wasmBinary = await new Response(stream).arrayBuffer();
  ort.env.wasm.wasmPaths = { mjs: new URL("ort/ort-wasm-simd-threaded.mjs", location.href).href };
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
}

function sessionOf(file) {
  if (!sessions.has(file)) sessions.set(file, ort.InferenceSession.create(`models/${file}`));
  return sessions.get(file);
}

// The pixels of an image as the network takes them: (1, 3, SIDE, SIDE) in [0, 1].
function tensorOf(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, SIDE, SIDE);
  const values = new Float32Array(3 * SIDE * SIDE);
  for (let i = 0; i < SIDE * SIDE; i++) {
    for (let c = 0; c < 3; c++) values[c * SIDE * SIDE + i] = data[4 * i + c] / 255;
  }
  return new ort.Tensor("float32", values, [1, 3, SIDE, SIDE]);
}

async function squareOf(source) {
  const image = await createImageBitmap(source);
  const canvas = Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
  canvas.getContext("2d").drawImage(image, 0, 0, SIDE, SIDE);
  return canvas;
}

async function mapsOf(file, tensor) {
  const session = await sessionOf(file);
  const found = await session.run({ image: tensor });
  return session.outputNames.map((name) => [name, found[name]]);
}

// A map from its least value (dark) to its largest (bright).
function drawn(map) {
  const [, height, width] = map.dims;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pixels = new ImageData(width, height);
  const low = Math.min(...map.data), range = Math.max(...map.data) - low || 1;
  map.data.forEach((value, i) => pixels.data.set([...colour((value - low) / range), 255], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

const colour = (t) => [8 + 239 * t ** 1.6, 64 + 188 * t ** 0.8, 129 + 111 * t];

function show(title, canvas) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = title;
  figure.append(canvas, caption);
  find("maps").append(figure);
}

async function update(listed) {
  const own = find("own").files[0];
  const photo = listed.photographs[find("photograph").value];
  const network = listed.networks[find("network").value];
  try {
    const source = own ?? (await (await fetch(`photos/${photo.file}`)).blob());
    const square = await squareOf(source);
    const begin = performance.now();
    const maps = await mapsOf(network.file, tensorOf(square));
    find("maps").replaceChildren();
    show("photograph", square);
    maps.forEach(([name, map]) => show(name, drawn(map)));
    find("status").textContent = `${network.name}: ${Math.round(performance.now() - begin)} ms`;
    find("credit").textContent = own ? "" : `Photograph: COCO, ${photo.file}, ${photo.credit}`;
  } catch (error) {
    find("status").textContent = `This image cannot be shown: ${error.message}`;
  }
}

// For the test, which serves this page and reads its requests: the mean of every map of a grey image.
async function selfTest(listed) {
  const grey = new ort.Tensor("float32", new Float32Array(3 * SIDE * SIDE).fill(0.5), [1, 3, SIDE, SIDE]);
  const found = {};
  for (const network of listed.networks) {
    const maps = await mapsOf(network.file, grey);
    found[network.name] = maps.map(([, map]) => map.data.reduce((sum, value) => sum + value, 0) / map.data.length);
  }
  const said = { found, status: find("status").textContent, figures: document.querySelectorAll("figure").length };
  await fetch(`found?${encodeURIComponent(JSON.stringify(said))}`);
}

async function main() {
  const listed = await (await fetch("files.json")).json();
  listed.networks.forEach(({ name }, i) => find("network").add(new Option(name, i)));
  listed.photographs.forEach((_, i) => find("photograph").add(new Option(`number ${i + 1}`, i)));
  await prepareRuntime();
  find("network").onchange = find("own").onchange = () => update(listed);
  find("photograph").onchange = () => { find("own").value = ""; update(listed); };
  await update(listed);
  if (location.hash === "#test") await selfTest(listed);
}

main().catch((error) => { find("status").textContent = `This page cannot run here: ${error.message}`; });
