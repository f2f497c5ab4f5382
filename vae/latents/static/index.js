// The Latents tab: sliders, the decoded image, a map of the encoded images, walks between two of them.
// One module, nothing from elsewhere. State (run, z, label) lives in TensorBoard's address, so that it can be shared.

const PALETTE = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
const MAP_ROWS = 12; // sliders of a latent that is a map, before a place is clicked
const MAP = 380; // pixels of the map's side
const STYLE = `
:root { --ink: #212121; --soft: #616161; --line: #d5d8dd; --paper: #fff; --back: #f5f6f8; --accent: #3b6ea8; --band: #c9d9ec; }
:root.dark { --ink: #e8e8e8; --soft: #a5a9b0; --line: #474b52; --paper: #303338; --back: #25272b; --accent: #7fb0e6; --band: #3e5673; }
* { box-sizing: border-box; }
body { margin: 0; padding: 12px; background: var(--back); color: var(--ink); font: 13px/1.4 Roboto, "Helvetica Neue", Arial, sans-serif; }
button, select { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--line); border-radius: 4px; padding: 3px 9px; }
button { cursor: pointer; } button:hover { border-color: var(--accent); color: var(--accent); }
input[type=range] { accent-color: var(--accent); margin: 0; }
h3 { margin: 0 0 6px; font-size: 12px; font-weight: 600; color: var(--soft); }
.bar { display: flex; gap: 10px; align-items: center; flex-wrap: wrap; margin-bottom: 8px; }
.soft { color: var(--soft); } .error { color: #c62828; font-weight: 500; } .error:empty { display: none; }
.panels { display: flex; gap: 12px; flex-wrap: wrap; align-items: flex-start; }
.panel { flex: 1 1 560px; min-width: 0; }
.body { display: flex; gap: 12px; flex-wrap: wrap; align-items: stretch; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; }
.card.over { border-color: var(--accent); box-shadow: 0 0 0 2px var(--band); }
img { image-rendering: pixelated; display: block; }
.shown { max-width: 260px; max-height: 260px; min-height: 64px; border: 1px solid var(--line); }
.shown.wide { width: 260px; } .shown.tall { height: 260px; }
.controls { display: grid; gap: 8px; margin-top: 10px; }
.controls > div, .row { display: flex; gap: 6px; align-items: center; flex-wrap: wrap; }
.sliders { flex: 1 1 320px; min-width: 300px; display: flex; flex-direction: column; }
.rows { overflow-y: auto; max-height: 440px; padding-right: 4px; }
.latent { display: grid; grid-template-columns: 38px 1fr 46px 84px; gap: 8px; align-items: center; height: 25px; }
.latent.inactive { opacity: .4; }
.latent .track { position: relative; height: 20px; display: flex; align-items: center; }
.latent .spread { position: absolute; height: 18px; background: var(--band); border-radius: 2px; }
.latent input { position: relative; width: 100%; background: transparent; }
.latent output { text-align: right; font-variant-numeric: tabular-nums; }
.maps { display: flex; gap: 8px 14px; flex-wrap: wrap; margin-bottom: 8px; max-height: 300px; overflow-y: auto; }
.channel { font-size: 11px; } .channel .pair { gap: 4px; min-height: 0; } .channel input { width: 100%; display: block; margin-top: 3px; }
.kl { position: relative; height: 15px; font-size: 11px; line-height: 15px; padding-left: 4px; white-space: nowrap; }
.kl i { position: absolute; inset: 0 auto 0 0; background: var(--band); border-radius: 2px; z-index: 0; } .kl b { position: relative; font-weight: 400; }
canvas { display: block; cursor: crosshair; border: 1px solid var(--line); border-radius: 3px; touch-action: none; }
.legend { display: flex; gap: 4px 10px; flex-wrap: wrap; max-width: ${MAP}px; margin-top: 6px; font-size: 11px; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 3px; }
.tip { position: fixed; pointer-events: none; padding: 4px; font-size: 11px; text-align: center; z-index: 9; box-shadow: 0 2px 8px #0004; }
.strip { display: flex; gap: 3px; flex-wrap: wrap; margin-top: 6px; min-height: 20px; }
.strip img { height: 48px; cursor: pointer; } .strip img:hover { outline: 2px solid var(--accent); }
.slot { width: 56px; height: 56px; border: 1px dashed var(--soft); border-radius: 4px; display: grid; place-items: center; cursor: pointer; overflow: hidden; }
.slot img, .pair img { height: 54px; } .pair { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; min-height: 54px; }
.near { background-repeat: no-repeat; image-rendering: pixelated; cursor: pointer; }
.below { display: flex; gap: 12px; flex-wrap: wrap; margin-top: 12px; } .below > .card { flex: 1 1 300px; min-width: 0; }
`;

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const option = (value, text = value) => make("option", { value, textContent: text });
const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

async function ask(route, query, body) {
  const address = `./${route}${query ? "?" + new URLSearchParams(query) : ""}`;
  const json = body !== undefined && !(body instanceof Blob);
  const answer = await fetch(address, body === undefined ? {} : { method: "POST", body: json ? JSON.stringify(body) : body });
  const type = answer.headers.get("Content-Type") || "";
  if (!type.includes("json")) {
    if (!answer.ok) throw new Error(`TensorBoard answered ${answer.status}.`);
    return answer.blob();
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error || `TensorBoard answered ${answer.status}.`);
  return found;
}

// --- the address: #latents&p.latents.run=NAME&p.latents.z=0:1.2,3:-0.5 (latents that are not 0) ------------------------

const frame = (() => {
  try { return window.parent.location.hash === undefined ? window : window.parent; } catch { return window; }
})();

function readAddress() {
  const found = {};
  for (const part of frame.location.hash.slice(1).split("&")) {
    const [key, value] = part.split("=");
    if (key.startsWith("p.latents.") && value !== undefined) found[key.slice(10)] = decodeURIComponent(value);
  }
  return found;
}

function writeAddress(panels) {
  const others = frame.location.hash.slice(1).split("&").filter((part) => part && !part.startsWith("p.latents."));
  const parts = others.length ? others : ["latents"];
  panels.forEach((panel, k) => {
    const number = k ? k + 1 : "";
    if (panel.run) parts.push(`p.latents.run${number}=${encodeURIComponent(panel.run)}`);
    const z = panel.z.map((value, i) => [i, +value.toFixed(3)]).filter(([, value]) => value).map((pair) => pair.join(":"));
    if (z.length && z.length <= 512) parts.push(`p.latents.z${number}=${encodeURIComponent(z.join(","))}`);
    if (panel.y !== null) parts.push(`p.latents.y${number}=${panel.y}`);
    if (panel.priors.value) parts.push(`p.latents.prior${number}=${encodeURIComponent(panel.priors.value)}`);
  });
  frame.history.replaceState(frame.history.state, "", "#" + parts.join("&"));
}

// --- one run --------------------------------------------------------------------------------------------------------

class Panel {
  constructor(changed) {
    this.changed = changed;
    this.run = null; this.z = []; this.y = null; this.slots = [null, null]; this.walked = [];
    this.runs = make("select", { className: "run", onchange: () => this.open(this.runs.value) });
    this.labels = make("select", { className: "label", onchange: () => { this.y = +this.labels.value; this.show(); } });
    this.priors = make("select", { className: "prior", title: "the prior of Draw and of the map's density", hidden: true,
      onchange: () => this.attempt(async () => { await this.drawMap(); this.changed(); }) });
    this.note = make("span", { className: "soft note" });
    this.error = make("div", { className: "error" });
    this.content = make("div");
    this.node = make("div", { className: "panel" },
      make("div", { className: "bar" }, this.runs, this.labels, this.priors, this.note), this.error, this.content);
  }

  attempt = async (work) => { // whatever goes wrong is a sentence above the panel
    try { this.error.textContent = ""; return await work(); } catch (error) { this.error.textContent = error.message; }
  };

  ask(route, body) { return ask(route, null, { run: this.run, ...body }); }

  list(names) { this.runs.replaceChildren(...names.map((name) => option(name))); }

  async open(run, z = "", y = null, prior = "") {
    this.run = this.runs.value = run;
    this.content.replaceChildren();
    this.note.textContent = "Loading the model …";
    await this.attempt(async () => {
      const facts = this.facts = await ask("summary", { run });
      this.z = new Array(facts.latents).fill(0);
      for (const pair of z.split(",")) {
        const [i, value] = pair.split(":").map(Number);
        if (i in this.z && Number.isFinite(value)) this.z[i] = value;
      }
      this.y = facts.classes ? Math.min(Math.max(0, Number(y) || 0), facts.classes - 1) : null;
      this.labels.replaceChildren(...Array.from({ length: facts.classes }, (_, k) => option(k, `label ${k}`)));
      this.labels.hidden = !facts.classes;
      if (this.y !== null) this.labels.value = this.y;
      this.priors.replaceChildren(option("", "prior of training"), ...facts.priors.map((name) => option(name)));
      this.priors.hidden = !facts.priors.length;
      if (facts.priors.includes(prior)) this.priors.value = prior;
      this.sheet = await createImageBitmap(await ask("thumbnails", { run }));
      this.slots = [null, null];
      this.build();
      await this.drawMap();
      await this.show();
    });
    const { shape, latents, kl, examples, active, map } = this.facts || {};
    this.note.textContent = this.error.textContent ? "" :
      `${shape.join(" × ")} images, ${latents} latents${map ? ` (${map.join(" × ")})` : ""}, ${active.filter(Boolean).length} active` +
      (kl ? `, rate ${kl.reduce((a, b) => a + b, 0).toFixed(2)} nats` : "") + ` · ${examples}`;
  }

  build() {
    const facts = this.facts, [, height, width] = facts.shape;
    this.image = make("img", { className: `shown ${width >= height ? "wide" : "tall"}`, alt: "decoded image" });
    const temperature = make("input", { type: "range", min: 0, max: 2, step: 0.05, value: 1, title: "temperature", style: "width:90px" });
    const degrees = make("span", { className: "soft", textContent: "T 1.00" });
    temperature.oninput = () => (degrees.textContent = `T ${(+temperature.value).toFixed(2)}`);
    const button = (text, className, onclick) => make("button", { textContent: text, className, onclick: () => this.attempt(onclick) });
    const picture = make("div", { className: "card" }, make("h3", { textContent: "Decoded" }), this.image,
      make("div", { className: "controls" },
        make("div", {}, button("Reset", "reset", () => this.move(this.z.map(() => 0))),
          button("Draw", "draw", async () => {
            const seed = Math.floor(Math.random() * 1e9);
            this.move((await this.ask("draw", { seed, temperature: +temperature.value, prior: this.priors.value })).z);
          }), temperature, degrees),
        make("div", {}, button("PNG", "png", () => this.save("png")), button("NPZ", "npz", () => this.save("npz")),
          button("Copy link", "link", () => navigator.clipboard.writeText(frame.location.href)))));
    this.rows = new Map();
    this.maps = null;
    const rows = make("div", { className: "rows" });
    const most = Math.max(1e-9, ...(facts.kl || [0]));
    for (const i of facts.order.slice(0, facts.map ? MAP_ROWS : undefined)) rows.append(this.row(i, most));
    const sliders = make("div", { className: "card sliders" }, ...(facts.map ? [this.mapsCard(rows, most)] : []),
      make("h3", { textContent: facts.kl ? "Latents by KL in nats; the band is the aggregate posterior’s mean ± std" :
        "Latents by the variance of the posterior mean; the band is the aggregate posterior’s mean ± std" }), rows);
    this.content.replaceChildren(
      make("div", { className: "body" }, picture, sliders, this.mapCard()),
      make("div", { className: "below" }, this.uploadCard(button), this.walkCard(button)));
  }

  // --- a latent that is a map: each channel as it is now, beside it what each place carries; a click gives a place its slider

  name(i) {
    if (!this.facts.map) return `z${i}`;
    const [, height, width] = this.facts.map;
    return `${Math.floor(i / (height * width))}:${Math.floor(i / width) % height},${i % width}`;
  }

  mapsCard(rows, most) {
    const { map: [, height, width], channels, kl, mean, std } = this.facts, places = height * width;
    const scale = Math.max(3, Math.floor(64 / Math.max(height, width)));
    const canvas = (className, title) => make("canvas", { width, height, className, title,
      style: `width:${width * scale}px;height:${height * scale}px;image-rendering:pixelated` });
    this.maps = channels.map((channel) => {
      const first = channel * places, now = canvas("now", "z as it is: click a place for its slider"), carried = canvas("carried", "KL of each place");
      const move = make("input", { type: "range", min: -3, max: 3, step: 0.01, value: 0, title: "move the whole channel" });
      move.oninput = () => {
        const shift = +move.value - this.level(first, places);
        for (let i = first; i < first + places; i++) this.z[i] += shift;
        this.show();
      };
      now.onclick = (event) => {
        const box = now.getBoundingClientRect();
        const x = Math.min(width - 1, Math.floor((event.clientX - box.left) / scale)), y = Math.min(height - 1, Math.floor((event.clientY - box.top) / scale));
        const i = first + y * width + x;
        if (!this.rows.has(i)) rows.prepend(this.row(i, most));
        else rows.prepend(this.rows.get(i).input.closest(".latent"));
        this.show();
      };
      if (kl) this.shade(carried, (k) => 255 * Math.max(0, kl[first + k]) / most);
      const total = kl ? ` · ${kl.slice(first, first + places).reduce((a, b) => a + b, 0).toFixed(1)} nats` : "";
      const node = make("div", { className: "channel" }, `channel ${channel}${total}`, make("div", { className: "pair" }, now, ...(kl ? [carried] : [])), move);
      node.dataset.channel = channel;
      return { first, places, now, move, node, reach: Math.max(3, ...Array.from({ length: places }, (_, k) => Math.abs(mean[first + k]) + 2 * std[first + k])) };
    });
    return make("div", {}, make("h3", { textContent: "Channels of the latent map by KL: as it is now, and what each place carries" }),
      make("div", { className: "maps" }, ...this.maps.map(({ node }) => node)));
  }

  level(first, places) { return this.z.slice(first, first + places).reduce((a, b) => a + b, 0) / places; }

  shade(canvas, level) {
    const context = canvas.getContext("2d"), pixels = context.createImageData(canvas.width, canvas.height);
    for (let k = 0; k < canvas.width * canvas.height; k++) {
      pixels.data.fill(Math.max(0, Math.min(255, level(k))), 4 * k, 4 * k + 3);
      pixels.data[4 * k + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  }

  row(i, most) {
    const { mean, std, kl, active } = this.facts;
    const reach = Math.max(3, Math.ceil(Math.abs(mean[i]) + 3 * std[i]));
    const input = make("input", { type: "range", min: -reach, max: reach, step: 0.01, value: this.z[i] });
    input.oninput = () => { this.z[i] = +input.value; this.show(); };
    const output = make("output");
    const place = (value) => `calc(8px + (100% - 16px) * ${Math.min(1, Math.max(0, (value + reach) / (2 * reach)))})`;
    const spread = make("div", { className: "spread" });
    spread.style.left = place(mean[i] - std[i]);
    spread.style.right = `calc(100% - ${place(mean[i] + std[i])})`;
    const bar = make("i"), text = make("b");
    if (kl) { bar.style.width = `${(100 * Math.max(0, kl[i])) / most}%`; text.textContent = kl[i].toFixed(2); }
    const node = make("div", { className: `latent${active[i] ? "" : " inactive"}`, title: active[i] ? "" : "inactive: its mean hardly varies" },
      make("span", { textContent: this.name(i) }), make("div", { className: "track" }, spread, input), output, make("div", { className: "kl" }, bar, text));
    node.dataset.latent = i;
    this.rows.set(i, { input, output, text });
    return node;
  }

  move(z, y) {
    this.z = [...z];
    if (y !== null && y !== undefined && this.y !== null) this.labels.value = this.y = y;
    return this.show();
  }

  async show() { // one request at a time; what came meanwhile is asked for next
    for (const [i, { input, output }] of this.rows) {
      if (Math.abs(this.z[i]) > +input.max) { input.max = Math.abs(this.z[i]); input.min = -input.max; }
      input.value = this.z[i];
      output.textContent = this.z[i].toFixed(2);
    }
    for (const { first, places, now, move, reach } of this.maps || []) {
      this.shade(now, (k) => 127.5 * (1 + this.z[first + k] / reach));
      move.value = this.level(first, places);
    }
    this.paint?.();
    this.stale = true;
    if (this.busy) return;
    this.busy = true;
    await this.attempt(async () => {
      while (this.stale) {
        this.stale = false;
        this.image.src = (await this.ask("decode", { z: [this.z], y: this.y })).images[0];
      }
    });
    this.busy = false;
    this.changed();
  }

  async save(format, z = [this.z]) {
    const file = await this.ask("file", { z, y: this.y, format });
    const link = make("a", { href: URL.createObjectURL(file), download: `latents.${format}` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // --- the map ------------------------------------------------------------------------------------------------------

  mapCard() {
    const { order, latents, labels } = this.facts;
    const axis = (k) => {
      const select = make("select", { className: `axis${k}`, onchange: () => this.attempt(() => this.drawMap()) });
      select.append(...order.slice(0, 512).map((i) => option(i, this.name(i))));
      select.value = order[Math.min(k, latents - 1)];
      return select;
    };
    this.axes = [axis(0), axis(1)];
    this.axes[0].append(option("pca", "PCA"));
    this.axes[0].value = latents > 2 ? "pca" : order[0];
    this.colour = make("select", { className: "colour", onchange: () => this.paint() });
    this.colour.append(...Object.keys(labels).map((name) => option(name)));
    this.colour.hidden = Object.keys(labels).length < 2;
    this.canvas = make("canvas", { width: MAP * 2, height: MAP * 2, style: `width:${MAP}px;height:${MAP}px` });
    this.legend = make("div", { className: "legend" });
    this.strip = make("div", { className: "strip", innerHTML: "<span class='soft'>Click to go there; drag to walk a line.</span>" });
    this.listen();
    return make("div", { className: "card", style: `max-width:${MAP + 26}px` },
      make("div", { className: "bar" }, make("h3", { textContent: "Map", style: "margin:0" }), ...this.axes, this.colour),
      this.canvas, this.legend, this.strip);
  }

  async drawMap() {
    const pca = this.axes[0].value === "pca";
    this.axes[1].hidden = pca;
    this.plane = await this.ask("plane", { axes: pca ? "pca" : this.axes.map((axis) => +axis.value), prior: this.priors.value });
    const density = this.plane.density, side = density.length;
    const image = new ImageData(side, side);
    density.forEach((row, j) => row.forEach((value, i) => {
      image.data.set([90, 110, 140, 110 * value], 4 * ((side - 1 - j) * side + i));
    }));
    this.density = await createImageBitmap(image);
    this.paint();
  }

  toPixels([x, y]) {
    const { low, high } = this.plane;
    return [((x - low[0]) / (high[0] - low[0])) * MAP, MAP - ((y - low[1]) / (high[1] - low[1])) * MAP];
  }

  toPlane([px, py]) {
    const { low, high } = this.plane;
    return [low[0] + (px / MAP) * (high[0] - low[0]), low[1] + (1 - py / MAP) * (high[1] - low[1])];
  }

  project(z) {
    const away = z.map((value, i) => value - this.plane.origin[i]);
    return [dot(away, this.plane.right), dot(away, this.plane.up)];
  }

  lift([x, y]) { // the shown latents, moved within the plane until they lie at (x, y)
    const [px, py] = this.project(this.z), { right, up } = this.plane;
    return this.z.map((value, i) => value + (x - px) * right[i] + (y - py) * up[i]);
  }

  paint() {
    if (!this.plane) return;
    const draw = this.canvas.getContext("2d"), values = this.facts.labels[this.colour.value];
    const kinds = values ? [...new Set(values)].sort((a, b) => a - b) : [];
    const few = kinds.length <= 20, most = kinds[kinds.length - 1] || 1;
    const paint = (value) => few ? PALETTE[kinds.indexOf(value) % 10] : `hsl(${260 - (200 * value) / most} 70% 50%)`;
    draw.setTransform(2, 0, 0, 2, 0, 0);
    draw.clearRect(0, 0, MAP, MAP);
    draw.drawImage(this.density, 0, 0, MAP, MAP);
    this.plane.points.forEach((point, k) => {
      const [x, y] = this.toPixels(point);
      draw.fillStyle = values ? paint(values[k]) : PALETTE[0];
      draw.globalAlpha = 0.8;
      draw.beginPath(); draw.arc(x, y, 2.4, 0, 7); draw.fill();
    });
    draw.globalAlpha = 1;
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    draw.strokeStyle = ink; draw.lineWidth = 1.5;
    if (this.line) { draw.beginPath(); draw.moveTo(...this.line[0]); draw.lineTo(...this.line[1]); draw.stroke(); }
    const [x, y] = this.toPixels(this.project(this.z));
    draw.beginPath(); draw.arc(x, y, 6, 0, 7); draw.moveTo(x - 10, y); draw.lineTo(x + 10, y); draw.moveTo(x, y - 10); draw.lineTo(x, y + 10); draw.stroke();
    draw.fillStyle = ink; draw.font = "11px sans-serif";
    const pca = this.axes[0].value === "pca", names = pca ? ["PC 1", "PC 2"] : this.axes.map((axis) => this.name(+axis.value));
    const { low, high } = this.plane;
    draw.textAlign = "right"; draw.fillText(`${names[0]}: ${low[0].toFixed(1)} to ${high[0].toFixed(1)} →`, MAP - 6, MAP - 6);
    draw.textAlign = "left"; draw.fillText(`↑ ${names[1]}: ${low[1].toFixed(1)} to ${high[1].toFixed(1)}`, 6, 14);
    this.legend.replaceChildren(...(few ? kinds : []).map((kind) =>
      make("span", {}, Object.assign(make("i"), { style: `background:${paint(kind)}` }), String(kind))));
  }

  nearest(spot, within) {
    let best = null, least = within ** 2;
    this.plane.points.forEach((point, k) => {
      const [x, y] = this.toPixels(point), distance = (x - spot[0]) ** 2 + (y - spot[1]) ** 2;
      if (distance < least) { least = distance; best = k; }
    });
    return best;
  }

  listen() {
    const spot = (event) => { const box = this.canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    const tip = make("div", { className: "card tip", hidden: true });
    this.node.querySelector(".tip")?.remove();
    this.node.append(tip);
    let start = null;
    const far = ([a, b]) => Math.hypot(a[0] - b[0], a[1] - b[1]) > 5;
    this.canvas.onpointerdown = (event) => { start = spot(event); this.canvas.setPointerCapture(event.pointerId); };
    this.canvas.onpointermove = (event) => {
      if (!this.plane) return;
      this.line = start && far([start, spot(event)]) ? [start, spot(event)] : null;
      const k = this.line ? null : this.nearest(spot(event), 6);
      tip.hidden = k === null;
      if (k !== null) {
        const label = this.facts.labels[this.colour.value]?.[k];
        tip.replaceChildren(this.thumbnail(k, 2), label === undefined ? `image ${k}` : `${this.colour.value} ${label}`);
        tip.style.left = `${event.clientX + 14}px`; tip.style.top = `${event.clientY + 14}px`;
      }
      if (start) this.paint();
    };
    this.canvas.onpointerleave = () => (tip.hidden = true);
    this.canvas.onpointercancel = () => { start = null; };
    this.canvas.onpointerup = (event) => this.attempt(async () => {
      if (!start || !this.plane) return;
      const ends = [start, spot(event)], k = this.nearest(ends[1], 4);
      start = null;
      if (far(ends)) {
        const [a, b] = ends.map((end) => this.lift(this.toPlane(end)));
        this.fill(this.strip, await this.ask("walk", { a, b, steps: 9, y: this.y }));
      } else if (k !== null) {
        const found = await this.ask("point", { index: k });
        await this.move(found.z, found.y);
      } else await this.move(this.lift(this.toPlane(ends[1])));
    });
  }

  thumbnail(k, scale) {
    const { width, height, columns } = this.facts.thumbnail;
    const canvas = make("canvas", { width, height, style: `width:${width * scale}px;height:${height * scale}px;image-rendering:pixelated` });
    canvas.getContext("2d").drawImage(this.sheet, (k % columns) * width, Math.floor(k / columns) * height, width, height, 0, 0, width, height);
    return canvas;
  }

  fill(strip, walk) {
    strip.replaceChildren(...walk.images.map((src, k) => make("img", { src, onclick: () => this.move(walk.z[k]) })));
  }

  // --- images brought along, and walks between two ------------------------------------------------------------------

  uploadCard(button) {
    const file = make("input", { type: "file", accept: "image/*", hidden: true, className: "upload" });
    file.onchange = () => file.files[0] && this.attempt(() => this.encode(file.files[0]));
    this.found = make("div", { className: "pair" }, make("span", { className: "soft", textContent: "Drop an image here, or choose a file: it is encoded, and the sliders go there." }));
    const card = make("div", { className: "card" },
      make("div", { className: "bar" }, make("h3", { textContent: "An image of yours", style: "margin:0" }), button("Choose a file …", "choose", () => file.click())), file, this.found);
    this.drop(card, (image) => this.encode(image));
    return card;
  }

  drop(node, take) {
    node.ondragover = (event) => { event.preventDefault(); node.classList.add("over"); };
    node.ondragleave = () => node.classList.remove("over");
    node.ondrop = (event) => {
      event.preventDefault(); event.stopPropagation(); node.classList.remove("over");
      if (event.dataTransfer.files[0]) this.attempt(() => take(event.dataTransfer.files[0]));
    };
  }

  send(image) { return ask("encode", this.y === null ? { run: this.run } : { run: this.run, y: this.y }, image); }

  async encode(image) {
    const found = await this.send(image);
    await this.move(found.z);
    for (const [i, { text }] of this.rows) if (found.rates) text.textContent = `${this.facts.kl ? this.facts.kl[i].toFixed(2) + " · " : ""}${found.rates[i].toFixed(2)}`;
    const neighbours = found.neighbours.map(({ index, distance }) => {
      const thumbnail = this.thumbnail(index, 1.25);
      thumbnail.title = `image ${index}, at ${distance.toFixed(2)}`;
      thumbnail.onclick = () => this.attempt(async () => { const { z, y } = await this.ask("point", { index }); await this.move(z, y); });
      return thumbnail;
    });
    this.found.replaceChildren(make("img", { src: found.image, title: "as the model takes it" }), "→", make("img", { src: found.reconstruction, title: "reconstruction", className: "reconstruction" }),
      make("span", { className: "measures", innerHTML: `rate <b>${found.rate.toFixed(2)}</b><br>distortion <b>${found.distortion.toFixed(2)}</b> nats` }),
      make("div", {}, make("div", { className: "soft", textContent: found.rates ? "Its rate per latent stands beside the KL. Neighbours:" : "Neighbours:" }), make("div", { className: "row neighbours" }, ...neighbours)));
  }

  walkCard(button) {
    const kind = make("select", { className: "path" }, option("straight"), option("spherical"));
    const strip = make("div", { className: "strip walked" });
    const slots = [0, 1].map((k) => {
      const slot = make("div", { className: "slot soft", title: "click: what is shown now; or drop an image here" }, "AB"[k]);
      const set = (z, src) => { this.slots[k] = z; slot.replaceChildren(make("img", { src })); return walk(); };
      slot.onclick = () => this.attempt(() => set([...this.z], this.image.src));
      this.drop(slot, async (image) => { const found = await this.send(image); await set(found.z, found.reconstruction); });
      return slot;
    });
    const walk = async () => {
      const [a, b] = this.slots;
      if (!a || !b) return;
      const found = await this.ask("walk", { a, b, steps: 11, path: kind.value, y: this.y });
      this.walked = found.z;
      this.fill(strip, found);
    };
    kind.onchange = () => this.attempt(walk);
    return make("div", { className: "card" },
      make("div", { className: "bar" }, make("h3", { textContent: "Between two images", style: "margin:0" }), kind,
        button("GIF", "gif", () => { if (!this.walked.length) throw new Error("Fill A and B first: click each for what is shown, or drop an image."); return this.save("gif", this.walked); })),
      make("div", { className: "row" }, ...slots, make("span", { className: "soft", textContent: "Click A, then B, for what is shown now, or drop images on them." })), strip);
  }
}

// --- the page -------------------------------------------------------------------------------------------------------

export async function render() {
  document.head.append(make("style", { textContent: STYLE }));
  const dark = () => document.documentElement.classList.toggle("dark", frame !== window && frame.document.body.classList.contains("dark-mode"));
  dark();
  if (frame !== window) new MutationObserver(dark).observe(frame.document.body, { attributes: true });
  const panels = [], place = make("div", { className: "panels" });
  const compare = make("input", { type: "checkbox", className: "compare" });
  const changed = () => writeAddress(panels);
  let names = [];
  const add = (run, z, y, prior) => {
    const panel = new Panel(changed);
    panels.push(panel);
    panel.list(names);
    place.append(panel.node);
    return panel.open(names.includes(run) ? run : names[Math.min(panels.length - 1, names.length - 1)], names.includes(run) ? z : "", y, prior);
  };
  const failed = make("div", { className: "error" });
  document.body.append(make("div", { className: "bar" }, make("label", { className: "row" }, compare, "Two side by side")), failed, place);
  try {
    names = (await ask("runs")).runs;
  } catch (error) {
    failed.textContent = error.message;
    return;
  }
  if (!names.length) {
    failed.textContent = "No run in the logdir has a config.yaml and checkpoints/best.ckpt yet.";
    return;
  }
  compare.onchange = () => {
    if (compare.checked) return add();
    panels.pop().node.remove();
    changed();
  };
  const state = readAddress();
  compare.checked = "run2" in state;
  await Promise.all([add(state.run, state.z, state.y, state.prior), ...(compare.checked ? [add(state.run2, state.z2, state.y2, state.prior2)] : [])]);
}
