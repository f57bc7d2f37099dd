// One image in, boxes out. The image is sent once for each confidence that is asked for; the boxes are drawn here.
"use strict";

// The colours of raypar/draw.py, so that a class looks the same in every picture.
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#8c564b",
                 "#9467bd", "#bcbd22", "#17becf", "#ff9896", "#2ca02c", "#aec7e8", "#d62728", "#c5b0d5"];
const ROWS_SHOWN = 100;
const $ = (id) => document.getElementById(id);
const colourOf = (classId) => COLOURS[classId % COLOURS.length];
const counted = (count, one, many) => `${count || "No"} ${count === 1 ? one : many}`;
const isDark = (hex) => [0.299, 0.587, 0.114].reduce((sum, w, i) => sum + w * parseInt(hex.slice(1 + 2 * i, 3 + 2 * i), 16), 0) < 110;

let image = null;        // {file, bitmap}
let detections = [];
let request = null;      // the AbortController of the newest request
let key = sessionStorage.getItem("raypar-key") || "";

class ServiceError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function ask(path, options = {}) {
  const headers = {...options.headers, ...(key ? {"X-API-Key": key} : {})};
  let response;
  try {
    response = await fetch(path, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service cannot be reached.");
  }
  if (response.ok) return response.json();
  const problem = await response.json().catch(() => ({}));
  throw new ServiceError(response.status, problem.detail || `The service answered ${response.status}.`);
}

function complain(error) {
  if (error && error.name === "AbortError") return;
  $("error").hidden = !error;
  $("error").textContent = error ? error.message : "";
  if (error && error.status === 401) {
    const wasRefused = key !== "";
    $("key-form").hidden = false;
    $("error").hidden = !wasRefused;
    $("error").textContent = "This API key is not accepted.";
    $("key").focus();
  }
}

async function showModel() {
  try {
    const model = await ask("v1/model");
    $("model").textContent = [model.name, counted(model.class_names.length, "class", "classes"), `${model.imgsz} px`].join(" \u00b7 ");
    $("model").title = `sha256 ${model.sha256}`;
    if (!image) setConf(model.conf);
    $("key-form").hidden = true;
    complain(null);
  } catch (error) {
    complain(error);
  }
}

async function show(file) {
  if (!file) return;
  complain(null);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {imageOrientation: "from-image"});
  } catch {
    complain(new Error(`"${file.name || "This"}" is not an image that the browser can show.`));
    return;
  }
  image = {file, bitmap};
  detections = [];
  draw();
  list();
  await detect();
}

async function detect() {
  if (!image) return;
  if (request) request.abort();
  const mine = request = new AbortController();
  $("status").textContent = "Looking ...";
  const start = performance.now();
  try {
    const body = image.file, headers = {"Content-Type": image.file.type || "image/unknown"};
    const answer = await ask(`v1/detect?conf=${$("conf").value}`, {method: "POST", body, headers, signal: mine.signal});
    const ms = Math.round(performance.now() - start);
    detections = answer.detections;
    complain(null);
    $("status").textContent = `${counted(detections.length, "object", "objects")} in ${ms} ms`;
  } catch (error) {
    if (error.name === "AbortError") return;
    detections = [];
    $("status").textContent = "No result.";
    complain(error);
  }
  draw();
  list();
}

function setConf(value) {
  $("conf").value = value;
  $("conf-value").textContent = Number($("conf").value).toFixed(2);
}

function draw(chosen = -1) {
  const canvas = $("canvas"), {bitmap} = image;
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.hidden = false;
  $("invite").hidden = true;
  $("drop").classList.add("shown");
  $("drop").title = "Drop, press or paste to see another image";
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const shownWidth = canvas.getBoundingClientRect().width || bitmap.width;
  const px = bitmap.width / shownWidth;          // image pixels in one pixel of the screen
  context.font = `600 ${13 * px}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const order = detections.map((_, i) => i).reverse();   // the surest on top
  for (const paint of [paintBox, paintLabel]) {           // no line crosses a label
    for (const i of order) {
      context.globalAlpha = chosen >= 0 && i !== chosen ? 0.12 : 1;
      paint(context, detections[i], px);
    }
  }
  context.globalAlpha = 1;
  canvas.dataset.boxes = detections.length;
}

function paintBox(context, {box_xyxy: [left, top, right, bottom], class_id: classId}, px) {
  context.strokeStyle = colourOf(classId);
  context.lineWidth = 2 * px;
  context.strokeRect(left, top, right - left, bottom - top);
}

function paintLabel(context, {box_xyxy: [left, top], class_id: classId, class_name: name, confidence}, px) {
  const colour = colourOf(classId), text = `${name} ${confidence.toFixed(2)}`, tall = 19 * px;
  const wide = context.measureText(text).width + 10 * px;
  const x = Math.max(0, Math.min(left - px, context.canvas.width - wide)), y = top >= tall ? top - tall : Math.max(0, top);
  context.fillStyle = colour;
  context.fillRect(x, y, wide, tall);
  context.fillStyle = isDark(colour) ? "#fff" : "#000";
  context.fillText(text, x + 5 * px, y + tall / 2);
}

function list() {
  const rows = detections.slice(0, ROWS_SHOWN).map((detection, i) => {
    const row = document.createElement("tr"), name = row.insertCell(), confidence = row.insertCell(), dot = document.createElement("span");
    dot.className = "dot";
    dot.style.background = colourOf(detection.class_id);
    name.append(dot, detection.class_name);
    confidence.textContent = detection.confidence.toFixed(2);
    row.addEventListener("mouseenter", () => draw(i));
    row.addEventListener("mouseleave", () => draw());
    return row;
  });
  $("rows").replaceChildren(...rows);
  $("found").hidden = rows.length === 0;
}

$("file").addEventListener("change", () => { show($("file").files[0]); $("file").value = ""; });
$("conf").addEventListener("input", () => setConf($("conf").value));
$("conf").addEventListener("change", detect);
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("raypar-key", key);
  await showModel();
  if ($("key-form").hidden) await detect();
});
addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files || [])].find((each) => each.type.startsWith("image/"));
  if (file) show(file);
});
addEventListener("resize", () => { if (image) draw(); });
for (const name of ["dragenter", "dragover"]) addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
for (const name of ["dragleave", "drop"]) addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
addEventListener("drop", (event) => show(event.dataTransfer.files[0]));

showModel();
