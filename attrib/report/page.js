// What the page can do beyond being read: sort, filter, find, compare, enlarge. Without this script everything is shown
// in the order of the files. Texts from data are set as textContent or as values of form fields, never as HTML.
"use strict";
(() => {
  const make = (tag, text = "", parent = null) => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };
  const choice = (title, names, parent) => {
    const label = make("label", `${title} `, parent);
    const select = make("select", "", label);
    names.forEach((name, i) => { make("option", name, select).value = String(i); });
    return select;
  };
  const finite = (values) => values.filter((value) => Number.isFinite(value));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const short = (value) => Number(value.toPrecision(3)).toString();

  // ---- the headline table ----------------------------------------------------------------------

  const valueOf = (cell) => {
    const text = cell.dataset.v === undefined ? cell.textContent.replaceAll(",", "") : cell.dataset.v;
    const found = Number.parseFloat(text);
    return text.endsWith("GiB") ? 1024 * found : found;
  };

  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, place) => {
      const button = make("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const falling = before ? before === "ascending" : head.textContent.includes("↑");
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows];
        const sign = falling ? -1 : 1;
        const compare = (a, b) => {
          if (place === 0) return sign * a.cells[0].dataset.v.localeCompare(b.cells[0].dataset.v);
          const [x, y] = [valueOf(a.cells[place]), valueOf(b.cells[place])];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
          return sign * (x - y);
        };
        table.tBodies[0].append(...rows.sort(compare));
      });
    });
  };

  // ---- which methods are shown -----------------------------------------------------------------

  const filterable = (block, box, methods, changed) => {
    const details = make("details", "", box);
    const summary = make("summary", "", details);
    const list = make("p", "", details);
    const boxes = methods.map((name) => {
      const label = make("label", "", list);
      const tick = make("input", "", label);
      tick.type = "checkbox";
      tick.checked = true;
      label.append(` ${name}`);
      return tick;
    });
    const apply = () => {
      const shown = new Set(boxes.flatMap((tick, i) => (tick.checked ? [i] : [])));
      summary.textContent = `Methods: ${shown.size} of ${methods.length} shown`;
      for (const element of block.querySelectorAll("[data-m]")) {
        const number = Number(element.dataset.m);
        element.hidden = number >= 0 && !shown.has(number);
      }
      changed(shown);
    };
    for (const [text, state] of [["all", true], ["none", false]]) {
      make("button", text, list).addEventListener("click", () => {
        boxes.forEach((tick) => { tick.checked = state; });
        apply();
      });
    }
    list.addEventListener("change", apply);
    box.hidden = methods.length < 2;
    apply();
  };

  // ---- samples: found and put in order ---------------------------------------------------------

  const findable = (box, rows, scores, shown) => {
    const places = new Map();
    (scores ? scores.uids : []).forEach((uid, i) => places.set(uid, [...(places.get(uid) || []), i]));
    const numbers = (row, column) => finite(
      (places.get(row.dataset.uid) || []).flatMap((i) => [...shown()].map((m) => column.values[m][i] ?? NaN)));
    const orders = [["as in the data", () => 0]];
    const text = (name) => (a, b) => a.dataset[name].localeCompare(b.dataset[name]);
    const by = (key) => (a, b) => {
      const [x, y] = [key(a), key(b)];
      return Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : x - y;
    };
    const sure = (row) => Number.parseFloat(row.dataset.sure);
    if (rows.some((row) => row.dataset.class)) orders.push(["by class", text("class")]);
    if (rows.some((row) => row.dataset.says)) orders.push(["by what the net says", text("says")]);
    if (rows.some((row) => row.dataset.sure)) {
      orders.push(["net least sure first", by(sure)], ["net surest first", by((row) => -sure(row))]);
    }
    for (const column of scores ? scores.columns : []) {
      const average = (row) => { const values = numbers(row, column); return values.length ? mean(values) : NaN; };
      const spread = (row) => {
        const values = numbers(row, column);
        return values.length > 1 ? Math.min(...values) - Math.max(...values) : NaN;
      };
      orders.push([`${column.name}: highest mean first`, by((row) => -average(row))]);
      orders.push([`${column.name}: lowest mean first`, by(average)]);
      if (scores.methods.length > 1) orders.push([`${column.name}: methods differ most first`, by(spread)]);
    }
    const label = make("label", "Find ", box);
    const input = make("input", "", label);
    input.type = "search";
    input.placeholder = "sample, class or prediction";
    const order = choice("Order", orders.map(([name]) => name), box);
    let wrong = null;
    if (rows.some((row) => row.dataset.right === "0")) {
      const tick = make("label", "", box);
      wrong = make("input", "", tick);
      wrong.type = "checkbox";
      tick.append(" only those that the net gets wrong");
    }
    const count = make("output", "", box);
    const apply = () => {
      const word = input.value.trim().toLowerCase();
      for (const row of rows) {
        const said = `${row.dataset.uid} ${row.dataset.class} ${row.dataset.says}`.toLowerCase();
        row.hidden = !said.includes(word) || Boolean(wrong && wrong.checked && row.dataset.right !== "0");
      }
      const sorted = [...rows].sort(orders[Number(order.value)][1]);
      sorted[0].parentNode.append(...sorted);
      count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
    };
    box.addEventListener("input", apply);
    box.hidden = rows.length < 2;
    apply();
    return apply;
  };

  // ---- two methods, sample by sample -----------------------------------------------------------

  const versus = (box, scores, show) => {
    const pick = box.querySelector(".pick");
    const svg = box.querySelector("svg");
    const [dot, word] = [svg.querySelector("circle"), svg.querySelector("text")];
    const table = box.querySelector("table");
    const [first, second] = ["Method", "against"].map((title) => choice(title, scores.methods, pick));
    const column = choice("under", scores.columns.map((one) => one.name), pick);
    dot.remove();
    word.remove();
    // The first two methods that have samples in common, under the first column where any do.
    const common = (values, a, b) => scores.uids.some(
      (_, i) => Number.isFinite(values[a][i] ?? NaN) && Number.isFinite(values[b][i] ?? NaN));
    const meet = () => {
      for (const [at, { values }] of scores.columns.entries()) {
        for (let a = 0; a < values.length; a += 1) {
          for (let b = a + 1; b < values.length; b += 1) if (common(values, a, b)) return [a, b, at];
        }
      }
      return [0, 1, 0];
    };
    const start = meet();
    [first, second, column].forEach((select, i) => { select.value = String(start[i]); });
    const at = (x, y, text, anchor) => {
      const label = word.cloneNode();
      label.setAttribute("x", String(x));
      label.setAttribute("y", String(y));
      label.setAttribute("text-anchor", anchor);
      label.textContent = text;
      svg.append(label);
    };
    const apply = () => {
      const [a, b, about] = [Number(first.value), Number(second.value), scores.columns[Number(column.value)]];
      const pairs = scores.uids
        .map((uid, i) => ({ uid, a: about.values[a][i] ?? NaN, b: about.values[b][i] ?? NaN }))
        .filter((pair) => Number.isFinite(pair.a) && Number.isFinite(pair.b))
        .sort((x, y) => (y.a - y.b) - (x.a - x.b));
      svg.querySelectorAll("circle, text").forEach((element) => element.remove());
      table.tHead.replaceChildren();
      table.tBodies[0].replaceChildren();
      const head = table.tHead.insertRow();
      for (const name of ["sample", scores.methods[a], scores.methods[b], "difference"]) make("th", name, head);
      const every = pairs.flatMap((pair) => [pair.a, pair.b]);
      const low = every.reduce((x, y) => Math.min(x, y), Infinity);
      const high = every.reduce((x, y) => Math.max(x, y), -Infinity);
      const span = high - low || 1;
      for (const pair of pairs) {
        const point = dot.cloneNode();
        point.setAttribute("cx", String(40 + (310 * (pair.a - low)) / span));
        point.setAttribute("cy", String(320 - (310 * (pair.b - low)) / span));
        const title = document.createElementNS(svg.namespaceURI, "title");
        title.textContent = `${pair.uid}: ${short(pair.a)}, ${short(pair.b)}`;
        point.append(title);
        point.addEventListener("click", () => show(pair.uid));
        svg.append(point);
        const row = table.tBodies[0].insertRow();
        make("button", pair.uid, make("td", "", row)).addEventListener("click", () => show(pair.uid));
        for (const value of [pair.a, pair.b, pair.a - pair.b]) make("td", short(value), row);
      }
      if (pairs.length) {
        at(40, 336, short(low), "start");
        at(350, 336, short(high), "end");
        at(36, 320, short(low), "end");
        at(36, 18, short(high), "end");
      }
      const named = (i) => (scores.methods[i].length > 44 ? `${scores.methods[i].slice(0, 43)}…` : scores.methods[i]);
      at(195, 352, `→ ${named(a)}`, "middle");
      at(46, 24, `↑ ${named(b)}`, "start");
      const ahead = { higher: "better", lower: "worse" }[about.direction] || "higher";
      const larger = pairs.filter((pair) => pair.a > pair.b).length;
      const sum = `${scores.methods[a]} is ${ahead} on ${larger} of ${pairs.length} samples, mean difference `;
      const rest = about.about ? ` ${about.name}: ${about.about}.` : "";
      box.querySelector(".sum").textContent = pairs.length
        ? `${sum}${short(mean(pairs.map((pair) => pair.a - pair.b)))}.${rest}` : "No sample has both scores.";
    };
    pick.addEventListener("change", apply);
    box.hidden = false;
    apply();
  };

  // ---- pictures, enlarged ----------------------------------------------------------------------

  const viewer = make("dialog", "", document.body);
  viewer.className = "viewer";
  viewer.setAttribute("aria-label", "maps, enlarged");
  const heading = make("p", "", viewer);
  const controls = make("p", "", viewer);
  const stage = make("div", "", viewer);
  const close = make("button", "close", viewer);
  close.addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });

  const figure = (picture, caption) => {
    const frame = make("figure", "", stage);
    const image = make("img", "", frame);
    image.src = picture.src;
    image.alt = picture.alt;
    image.className = picture.className;
    make("figcaption", caption, frame);
    return image;
  };

  const enlarge = (picture) => {
    heading.textContent = picture.alt;
    controls.replaceChildren();
    stage.replaceChildren();
    stage.className = "";
    figure(picture, "");
    viewer.showModal();
  };

  const kept = { left: "", right: "", over: false };  // from one sample to the next

  const view = (row, picture = null) => {
    const tiles = [...row.querySelectorAll("td")].filter((cell) => !cell.hidden && cell.querySelector("img"));
    const names = tiles.map((cell) => cell.dataset.label || "sample");
    const rows = [...row.parentNode.children].filter((other) => !other.hidden);
    const judged = { 1: ", right", 0: ", wrong" }[row.dataset.right] || "";
    heading.textContent = [row.dataset.class, row.dataset.says && `net: ${row.dataset.says}${judged}`, row.dataset.uid]
      .filter(Boolean).join(" · ");
    controls.replaceChildren();
    const [left, right] = ["Left", "Right"].map((title) => choice(title, names, controls));
    const place = (name, otherwise) => String(Math.max(0, names.includes(name) ? names.indexOf(name) : otherwise));
    left.value = place(kept.left, 0);
    right.value = place(kept.right, Math.min(1, names.length - 1));
    if (picture) right.value = String(Math.max(0, tiles.findIndex((cell) => cell.contains(picture))));
    const label = make("label", "", controls);
    const over = make("input", "", label);
    over.type = "checkbox";
    over.checked = kept.over;
    label.append(" one over the other");
    const slider = make("input", "", make("label", "slider ", controls));
    slider.type = "range";
    for (const [text, step] of [["previous", -1], ["next", 1]]) {
      const button = make("button", text, controls);
      const other = rows[rows.indexOf(row) + step];
      button.disabled = !other;
      button.addEventListener("click", () => {
        view(other);
        const again = [...controls.querySelectorAll("button:not(:disabled)")];
        (again.find((one) => one.textContent === text) || again[0]).focus();  // the controls are made anew
      });
    }
    const draw = () => {
      Object.assign(kept, { left: names[left.value], right: names[right.value], over: over.checked });
      stage.replaceChildren();
      stage.className = over.checked ? "over" : "beside";
      slider.parentNode.hidden = !over.checked;
      const images = [left, right].map((select) => figure(
        tiles[Number(select.value)].querySelector("img"), names[Number(select.value)]));
      if (over.checked) images[1].parentNode.style.clipPath = `inset(0 0 0 ${slider.value}%)`;
    };
    for (const field of [left, right, over, slider]) field.addEventListener("input", draw);
    draw();
    if (!viewer.open) viewer.showModal();
  };

  const pressable = (picture, action) => {
    picture.tabIndex = 0;
    picture.setAttribute("role", "button");
    picture.addEventListener("click", action);
    picture.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      action();
    });
  };

  // ---- all together ----------------------------------------------------------------------------

  for (const block of document.querySelectorAll("section.block")) {
    const scores = block.dataset.scores ? JSON.parse(block.dataset.scores) : null;
    if (scores) {
      const numbers = (values) => scores.uids.map((_, i) => values[i] ?? null);
      for (const column of scores.columns) column.values = column.values.map(numbers);
    }
    const rows = [...block.querySelectorAll(".sample")];
    let shown = new Set();
    let refresh = () => {};
    const names = [...block.querySelectorAll("table.head tbody tr")];
    const methods = names.sort((a, b) => a.dataset.m - b.dataset.m).map((row) => row.cells[0].dataset.v);
    for (const table of block.querySelectorAll("table.head")) sortable(table);
    for (const box of block.querySelectorAll(".filter")) {
      filterable(block, box, methods, (found) => { shown = found; refresh(); });
    }
    for (const box of block.querySelectorAll(".find")) {
      if (rows.length) refresh = findable(box, rows, scores, () => shown);
    }
    const show = (uid) => {
      const row = rows.find((one) => one.dataset.uid === uid);
      if (!row) return;
      row.hidden = false;
      row.scrollIntoView({ block: "center" });
      if (row.querySelector("img")) view(row);
    };
    for (const box of block.querySelectorAll(".versus")) {
      if (scores && scores.methods.length > 1) versus(box, scores, show);
    }
    for (const row of rows) {
      for (const picture of row.querySelectorAll("img")) pressable(picture, () => view(row, picture));
    }
  }
  for (const picture of document.querySelectorAll(".plots img")) pressable(picture, () => enlarge(picture));
  document.documentElement.classList.add("scripted");
})();
