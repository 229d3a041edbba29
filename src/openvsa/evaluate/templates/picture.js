"use strict";
// Draws the tiles over the frames and shows which ones a chosen tile read.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("picture-data").textContent);
  const { panels, numBlocks } = data;
  const numHeads = data.heads.length;
  const rowBytes = Math.ceil(numBlocks / 8);
  const svg = (name, attributes, parent) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };
  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

  // ---- the data -------------------------------------------------------------------------------------------------
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const probabilityOf = Float64Array.from({ length: 256 }, (_, code) =>
    code ? 2 ** ((code / 255 - 1) * data.probabilityBits) : 0);
  const unpacked = new Map();
  const find = (step, layer) => data.calls.find((call) => call.step === step && call.layer === layer);

  function callAt(step, layer) {
    const key = `${step} ${layer}`;
    if (!unpacked.has(key)) {
      const call = find(step, layer);
      unpacked.set(key, { kept: bytes(call.kept), probability: bytes(call.probability), recall: bytes(call.recall) });
    }
    return unpacked.get(key);
  }

  // What a tile read: for one head, or the mean over all of them.
  function rowOf(tile) {
    const call = callAt(state.step, state.layer);
    const heads = state.head === "mean" ? [...Array(numHeads).keys()] : [state.head];
    const weight = new Float64Array(numBlocks);
    const readers = new Uint16Array(numBlocks);
    let recall = 0;
    for (const head of heads) {
      const row = head * numBlocks + tile;
      recall += call.recall[row] / 255 / heads.length;
      for (let block = 0; block < numBlocks; block++) {
        if (!((call.kept[row * rowBytes + (block >> 3)] >> (block & 7)) & 1)) continue;
        readers[block]++;
        weight[block] += probabilityOf[call.probability[row * numBlocks + block]] / heads.length;
      }
    }
    return { weight, readers, recall, heads: heads.length };
  }

  // ---- the drawing ----------------------------------------------------------------------------------------------
  const slabs = panels.filter((panel) => panel.kind === "frames");
  byId("picture").style.setProperty("--columns", slabs.length === 4 ? 2 : Math.min(slabs.length, 3));
  const tiles = new Array(numBlocks);
  const places = new Array(numBlocks);
  panels.forEach((panel, index) => {
    const columns = panel.xs.length - 1;
    const rows = panel.ys.length - 1;
    const [width, height] = panel.kind === "frames" ? [data.width, data.height] : [data.width, data.width / 24];
    const figure = document.createElement("figure");
    figure.className = panel.kind;
    const caption = document.createElement("figcaption");
    caption.textContent = panel.label;
    figure.append(caption);
    const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": panel.label }, figure);
    if (panel.image) svg("image", { href: panel.image, width, height, preserveAspectRatio: "none" }, drawing);
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const block = panel.first + row * columns + column;
        const box = {
          x: panel.xs[column] * width, y: panel.ys[row] * height,
          width: (panel.xs[column + 1] - panel.xs[column]) * width,
          height: (panel.ys[row + 1] - panel.ys[row]) * height,
        };
        const where = panel.kind === "frames" ? `row ${row + 1}, column ${column + 1}` : `block ${column + 1}`;
        places[block] = { index, row, column, box, drawing, name: `${panel.label}, ${where}` };
        tiles[block] = svg("rect", {
          ...box, class: "tile", "data-tile": block, role: "button", tabindex: -1, "aria-label": places[block].name,
        }, drawing);
      }
    }
    byId("picture").append(figure);
  });
  const markers = Object.fromEntries(["pointed", "chosen"].map((kind) =>
    [kind, svg("rect", { class: `marker ${kind}` }, places[0].drawing)]));

  function mark(kind, tile) {
    markers[kind].toggleAttribute("hidden", tile === null);
    markers[kind].style.display = tile === null ? "none" : "";
    if (tile === null) return;
    for (const [key, value] of Object.entries(places[tile].box)) markers[kind].setAttribute(key, value);
    places[tile].drawing.append(markers[kind]);
  }

  function draw() {
    const tile = state.pointed ?? state.tile;
    const { weight, readers, recall, heads } = rowOf(tile);
    const most = Math.max(...weight);
    let kept = 0;
    tiles.forEach((element, block) => {
      kept += readers[block] / heads;
      element.dataset.kept = readers[block] ? 1 : 0;
      // The square root keeps the weaker of the tiles that were read apart from each other.
      element.style.setProperty("--share", (0.16 + 0.54 * Math.sqrt(weight[block] / (most || 1))).toFixed(3));
    });
    const count = Number.isInteger(kept) ? String(kept) : kept.toFixed(1);
    byId("tile-name").textContent = `tile in ${places[tile].name}`;
    byId("kept-label").textContent = heads > 1 ? "tiles read, on average" : "tiles read";
    byId("kept-count").textContent = count;
    byId("recall").textContent = percent(recall);
    byId("most").textContent = `${percent(most)} of its attention`;
    mark("pointed", state.pointed);
    mark("chosen", state.tile);
    return `Tile in ${places[tile].name} read ${count} of ${numBlocks} tiles, recall ${percent(recall)}.`;
  }

  // ---- the choices ----------------------------------------------------------------------------------------------
  const middle = (list) => list[Math.floor(list.length / 2)];
  const centre = middle(slabs);
  const half = (edges) => Math.floor((edges.length - 1) / 2);
  const state = {
    step: middle(data.steps).step,
    layer: middle(data.layers).layer,
    head: 0,
    tile: centre.first + half(centre.ys) * (centre.xs.length - 1) + half(centre.xs),
    pointed: null,
  };

  function chips(id, name, options) {
    const box = byId(id).querySelector("div");
    for (const { value, label, hint } of options) {
      const chip = document.createElement("label");
      chip.className = "chip";
      chip.title = hint;
      const input = Object.assign(document.createElement("input"), {
        type: "radio", name, value, checked: value === state[name],
      });
      const text = document.createElement("span");
      text.textContent = label;
      chip.append(input, text);
      box.append(chip);
      input.addEventListener("change", () => {
        state[name] = value;
        settle();
        byId("spoken").textContent = draw();
      });
    }
  }

  // A record may lack some pairs of step and layer: offer only those it has, and stay on one of them.
  function settle() {
    const there = data.layers.filter(({ layer }) => find(state.step, layer)).map(({ layer }) => layer);
    if (!there.includes(state.layer)) state.layer = middle(there);
    for (const input of byId("layers").querySelectorAll("input")) {
      input.disabled = !there.includes(Number(input.value));
      input.checked = Number(input.value) === state.layer;
    }
  }

  function choose(tile) {
    tiles[state.tile].setAttribute("tabindex", -1);
    tiles[tile].setAttribute("tabindex", 0);
    state.tile = tile;
    state.pointed = null;
    byId("spoken").textContent = draw();
  }

  function move(tile, [inTime, down, right]) {
    const limit = (value, count) => Math.min(Math.max(value, 0), count - 1);
    const place = places[tile];
    const panel = panels[limit(place.index + inTime, panels.length)];
    const columns = panel.xs.length - 1;
    const row = limit(place.row + down, panel.ys.length - 1);
    return panel.first + row * columns + limit(place.column + right, columns);
  }

  const steps = {
    ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0],
    PageUp: [-1, 0, 0], PageDown: [1, 0, 0],
  };
  const tileUnder = (event) => {
    const tile = event.target.dataset.tile;
    return tile === undefined ? null : Number(tile);
  };
  const picture = byId("picture");
  picture.addEventListener("pointerover", (event) => {
    // A finger has no hover: its press is a choice.
    if (event.pointerType === "touch") return;
    state.pointed = tileUnder(event);
    draw();
  });
  picture.addEventListener("pointerleave", () => {
    state.pointed = null;
    draw();
  });
  picture.addEventListener("click", (event) => {
    const tile = tileUnder(event);
    if (tile !== null) choose(tile);
  });
  picture.addEventListener("keydown", (event) => {
    if (!(event.key in steps) || tileUnder(event) === null) return;
    event.preventDefault();
    choose(move(state.tile, steps[event.key]));
    tiles[state.tile].focus();
  });

  // The page of generate counts steps from 1, that of an audit from 0.
  chips("steps", "step", data.steps.map(({ step, timestep }) =>
    ({ value: step, label: String(step + (data.firstStep ?? 1)), hint: `timestep ${Math.round(timestep)}` })));
  chips("layers", "layer", data.layers.map(({ layer, name }) => ({ value: layer, label: String(layer), hint: name })));
  chips("heads", "head", [
    ...data.heads.map((name, head) => ({ value: head, label: String(name), hint: `head ${name}` })),
    { value: "mean", label: "mean", hint: "mean of these heads" },
  ]);
  settle();
  choose(state.tile);
})();
