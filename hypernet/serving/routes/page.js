// What the page does beyond its form: files, progress, the memory, the break-even plot. No library, no other host.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function headers() {
  const key = $("key")?.value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function api(method, path, body) {
  const json = body === undefined ? {} : { "Content-Type": "application/json" };
  const response = await fetch(path, {
    method,
    headers: { ...headers(), ...json },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const found = await response.json();
  if (!response.ok) throw new Error(found.error.message);
  return found;
}

/** Runs work; what is wrong with it is told in one line at `place`. */
async function told(place, work) {
  try {
    place.removeAttribute("role");
    place.textContent = "";
    place.setAttribute("role", "status");
    await work();
  } catch (error) {
    place.setAttribute("role", "alert");
    place.textContent = error.message;
  }
}

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Pixels that a drawing has there. */
function widthOf(place) {
  return Math.min(704, place.clientWidth || 640);
}

function button(text, label, work) {
  const made = element("button", { type: "button", "aria-label": label }, text);
  made.addEventListener("click", () => told($("memory-status"), work));
  return made;
}

// --- The document and its four answers

async function readFile(file) {
  const response = await fetch(`/text?name=${encodeURIComponent(file.name)}`, {
    method: "POST",
    headers: headers(),
    body: file,
  });
  const found = await response.json();
  if (!response.ok) throw new Error(found.error.message);
  $("document").value = found.text;
  $("name").value = found.name;
  $("status").textContent = `${found.name}: ${found.text.length.toLocaleString("en")} characters`;
}

async function answers(form) {
  const body = new URLSearchParams(new FormData(form));
  const response = await fetch("/answers", { method: "POST", body });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const bar = $("progress");
  bar.hidden = false;
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const events = (text + value).split("\n\n");
    text = events.pop();
    for (const event of events.map((line) => JSON.parse(line.slice("data: ".length)))) {
      if (event.html !== undefined) {
        $("result").innerHTML = event.html; // made by this server, with everything escaped
        $("status").textContent = "";
      } else {
        bar.max = event.chunks;
        bar.value = event.done;
        const what = event.done < event.chunks ? "chunks read into the adapter" : "chunks read; answering";
        $("status").textContent = `${event.done} of ${event.chunks} ${what}`;
      }
    }
  }
  bar.hidden = true;
}

// --- Break-even

/** Milliseconds that the table shows: once for the adapter, and of each way's answer. */
function measured() {
  const note = document.querySelector("[data-prepared-ms]");
  const cells = [...document.querySelectorAll('#result td[data-unit="ms"]')];
  if (!note || cells.length < 4) return null;
  const [none, adapter, , whole] = cells.map((cell) => Number(cell.textContent.replaceAll(",", "")));
  return { none, adapter, whole, prepared: Number(note.dataset.preparedMs) };
}

function plotBreakEven() {
  const found = measured();
  $("breakeven").hidden = found === null;
  if (found === null) return;
  const times = Number($("length").value);
  $("length-shown").textContent = times;
  const prepared = found.prepared * times;
  const whole = found.none + (found.whole - found.none) * times;
  const even = whole > found.adapter ? prepared / (whole - found.adapter) : Infinity;
  const most = Math.min(1000, Math.max(10, Number.isFinite(even) ? Math.ceil(2 * even) : 50));
  const top = Math.max(prepared + most * found.adapter, most * whole, 1);
  const right = widthOf($("plot")) - 10; // drawn in pixels, so that text has its size on a phone too
  const x = (n) => 20 + (n / most) * (right - 20);
  const y = (ms) => 250 - (ms / top) * 230;
  const line = (from, to, dash) =>
    drawn("line", {
      ...{ x1: x(0), y1: y(from), x2: x(most), y2: y(to), stroke: "currentColor", "stroke-width": 3 },
      "stroke-dasharray": dash,
    });
  const plot = drawn("svg", { viewBox: `0 0 ${right + 10} 300`, role: "img", "aria-labelledby": "breakeven-says" });
  plot.append(
    drawn("path", { d: `M20 20V250H${right}`, fill: "none", stroke: "currentColor", opacity: 0.4 }),
    line(prepared, prepared + most * found.adapter, "none"),
    line(0, most * whole, "8 5"),
    drawn("text", { x: 20, y: 270 }, "0"),
    drawn("text", { x: right, y: 270, "text-anchor": "end" }, `${most} questions`),
    drawn("text", { x: 20, y: 14 }, `${(top / 1000).toFixed(1)} s altogether`),
    drawn("text", { x: 20, y: 292 }, "solid: adapter · dashed: document in each prompt"),
  );
  if (even <= most) {
    const at = prepared + even * found.adapter;
    plot.append(
      drawn("circle", { cx: x(even), cy: y(at), r: 7, fill: "var(--accent)" }),
      drawn("line", { x1: x(even), y1: y(at), x2: x(even), y2: 250, stroke: "var(--accent)", "stroke-width": 2 }),
    );
  }
  $("plot").replaceChildren(plot);
  $("breakeven-says").textContent = Number.isFinite(even)
    ? `The adapter costs less time from ${Math.max(1, Math.ceil(even)).toLocaleString("en")} questions on.`
    : "With these milliseconds the adapter never costs less time.";
}

// --- The memory

async function showMemories() {
  const { data } = await api("GET", "/v1/memories?limit=200");
  const rows = data.map((memory) => {
    const text = element("th", { scope: "row", class: "answer" }, memory.text);
    const name = memory.text.slice(0, 60);
    const change = element(
      "td",
      {},
      button("Correct", `Correct: ${name}`, () => correct(memory, text)),
      button("Forget", `Forget: ${name}`, async () => {
        if (!confirm(`Forget "${memory.text}"?`)) return;
        await api("POST", `/v1/memories/${memory.id}/forget`, { verify: false });
        await showMemories();
        $("memory-status").textContent = "Forgotten.";
      }),
    );
    const cells = [memory.valid_at.slice(0, 10), memory.source ?? "said here", memory.tiers.join(", ")];
    return element("tr", {}, text, ...cells.map((cell) => element("td", {}, cell)), change);
  });
  const none = element("tr", {}, element("td", { colspan: 5 }, "Nothing yet."));
  $("known").tBodies[0].replaceChildren(...(rows.length ? rows : [none]));
  const versions = (await api("GET", "/v1/memories/versions")).data.filter((one) => !one.taken_back).reverse();
  $("versions").replaceChildren(
    ...versions.slice(0, 50).map((one) => {
      const said = `${one.version}: ${one.operation}, ${one.memories} memories, ${one.at.slice(0, 16).replace("T", " ")} `;
      const back = button("Roll back", `Roll back ${one.version}`, async () => {
        await api("POST", "/v1/memories/rollback", { version: one.version });
        await showMemories();
        $("memory-status").textContent = `${one.version} is taken back.`;
      });
      return element("li", {}, said, back);
    }),
  );
}

function correct(memory, cell) {
  const field = element("input", { "aria-label": "Corrected text" });
  field.value = memory.text;
  const save = button("Save", "Save the correction", async () => {
    await api("PATCH", `/v1/memories/${memory.id}`, { content: field.value });
    await showMemories();
    $("memory-status").textContent = "Corrected.";
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") save.click();
    if (event.key === "Escape") cell.replaceChildren(memory.text);
  });
  cell.replaceChildren(field, save);
  field.focus();
}

async function explain() {
  const asked = { question: $("memory-question").value, tier: $("tier").value };
  const answer = await api("POST", "/v1/memories/ask", asked);
  $("memory-status").textContent = `${answer.text || "(no answer)"}, from the tier ${answer.tier}: ${answer.reason}`;
  $("bars").replaceChildren();
  const { data } = await api("POST", "/v1/memories/explain", answer);
  if (!data.length) return;
  const most = Math.max(...data.map((one) => Math.abs(one.effect)), 1e-9);
  const [height, wide] = [44 * data.length, widthOf($("bars"))];
  const plot = drawn("svg", { viewBox: `0 0 ${wide} ${height}`, role: "img", "aria-label": "Effect of each memory, nats" });
  data.forEach((one, row) => {
    const width = Math.max(2, (Math.abs(one.effect) / most) * (wide - 80));
    const letters = Math.floor(wide / 8);
    const text = one.text.length > letters ? `${one.text.slice(0, letters - 3)}...` : one.text;
    const nats = Math.abs(one.effect) < 0.05 ? "0.0" : one.effect.toFixed(1);
    plot.append(
      drawn("text", { x: 0, y: 44 * row + 14 }, text),
      drawn("rect", { x: 0, y: 44 * row + 20, width, height: 14, fill: one.effect < 0 ? "#c33" : "var(--accent)" }),
      drawn("text", { x: width + 8, y: 44 * row + 32 }, `${nats} nats`),
    );
  });
  $("bars").replaceChildren(plot);
}

// --- What happens when

for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const asking = event.submitter;
  if (asking) asking.disabled = true;
  told($("status"), async () => {
    await answers(event.target);
    plotBreakEven();
    await showMemories();
  }).finally(() => {
    $("progress").hidden = true;
    if (asking) asking.disabled = false;
  });
});
$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  if (file) told($("status"), () => readFile(file));
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"])
  $("drop").addEventListener(kind, (event) => {
    if (kind !== "dragleave") event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) told($("status"), () => readFile(file));
  });
$("document").addEventListener("input", () => ($("name").value = "")); // no longer the file's
$("length").addEventListener("input", plotBreakEven);
$("explain").addEventListener("submit", (event) => {
  event.preventDefault();
  told($("memory-status"), explain);
});
$("write").addEventListener("click", () =>
  told($("memory-status"), async () => {
    const found = await api("POST", "/v1/memories/write_adapters");
    await showMemories();
    $("memory-status").textContent = `${found.written} adapters written.`;
  }),
);
$("key")?.addEventListener("change", () => told($("memory-status"), showMemories));
plotBreakEven();
if (!$("key")) told($("memory-status"), showMemories);
