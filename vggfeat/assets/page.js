// What makes a page answer to pointer and keyboard. Without it all is there to be read.
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, kind, text) => {
    const element = document.createElement(tag);
    element.className = kind || "";
    if (text) // long names may be broken behind / _ - .
      element.append(...text.split(/(?<=[/_.-])(?=[^/_.-])/).flatMap(part => [document.createElement("wbr"), part]));
    return element;
  };
  const number = value => Number(value.toPrecision(5)).toLocaleString("en", { maximumSignificantDigits: 6 });
  const signed = value => value === null ? "-" : (value < 0 ? "-" : "+") + Math.abs(value).toFixed(2);
  const images = n => `${n.toLocaleString("en")} image${n === 1 ? "" : "s"}`;

  // --- the readout, one for the page ---------------------------------------------------------------

  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;

  function tell(text, x, y, tile) {
    tip.replaceChildren(text);
    if (tile) tip.prepend(tile);
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.max(4, Math.min(x + 14, innerWidth - width - 4));
    const top = y + 18 + height > innerHeight ? y - height - 14 : y + 18;
    tip.style.transform = `translate(${left}px, ${Math.max(4, top)}px)`;
  }

  // pointer and keys on an element with points {x, y}, in units of `size()` by which its box is measured
  // find(x, y, unit): [place of a point, whether it is told for its nearness], there being `unit` in a pixel
  function interactive(element, points, { label, size, next, show, hide, choose, find }) {
    if (!points.length) return;
    let current = -1;
    const place = () => element.getBoundingClientRect();
    const go = (i, near) => {
      current = i;
      const box = place(), [width, height] = size();
      show(points[i], box.left + points[i].x / width * box.width, box.top + points[i].y / height * box.height, near);
    };
    const leave = () => { tip.hidden = true; hide(); };
    const point = event => {  // at the pointer; undefined where there is none
      const box = place(), [width, height] = size();
      const x = (event.clientX - box.left) / box.width * width, y = (event.clientY - box.top) / box.height * height;
      const [i, near] = find ? find(x, y, width / box.width) : [nearest(points, x, y)];
      if (i === undefined) leave(); else go(i, near);
      return points[i];
    };
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-label", `${label}. Arrow keys tell its values.`);
    element.addEventListener("pointermove", point);
    element.addEventListener("pointerleave", leave);
    element.addEventListener("blur", leave);
    element.addEventListener("focus", () => { if (element.matches(":focus-visible")) go(Math.max(current, 0)); });
    element.addEventListener("click", event => { const found = point(event); if (found && choose) choose(found); });
    element.addEventListener("keydown", event => {
      if (event.key === "Escape") leave();
      else if (event.key === "Enter" && choose && current >= 0) choose(points[current]);
      else {
        const i = event.key === "Home" ? 0 : event.key === "End" ? points.length - 1 : next(Math.max(current, 0), event.key);
        if (i === undefined) return;
        go(i);
      }
      event.preventDefault();
    });
  }

  // the place of the point nearest to x, y; undefined where none is within reach
  function nearest(points, x, y, reach = Infinity) {
    let best, least = reach ** 2;
    points.forEach((p, i) => {
      const far = (p.x - x) ** 2 + (p.y - y) ** 2;
      if (far < least) [best, least] = [i, far];
    });
    return best;
  }

  // the next point in the direction of an arrow key: near, and not far to its side
  const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  function towards(points, from, key) {
    if (!(key in WAYS)) return undefined;
    const [across, down] = WAYS[key], start = points[from];
    let best = from, least = Infinity;
    points.forEach((p, i) => {
      const ahead = (p.x - start.x) * across + (p.y - start.y) * down;
      const aside = Math.abs((p.x - start.x) * down) + Math.abs((p.y - start.y) * across);
      if (ahead > 1e-6 && ahead + 3 * aside < least) [best, least] = [i, ahead + 3 * aside];
    });
    return best;
  }

  // --- charts --------------------------------------------------------------------------------------

  for (const svg of all("figure.chart > svg, figure.small > svg")) {
    const titled = all("title", svg).map(title => { title.remove(); return title.textContent; });
    const groups = all("g[data-values]", svg);
    const map = !groups.length;
    const points = map
      ? all("circle", svg).map((dot, i) => ({ x: +dot.getAttribute("cx"), y: +dot.getAttribute("cy"), i, text: titled[i] }))
      : groups.flatMap((group, series) => {
        const values = group.dataset.values.split(" ");
        return (group.querySelector("polyline").getAttribute("points") || "").split(" ").filter(Boolean).map((at, i) => {
          const [x, y] = at.split(",").map(Number), [a, b] = values[i].split(",").map(Number);
          const name = groups.length > 1 ? `${group.dataset.name}\n` : "";
          return { x, y, series, text: `${name}${svg.dataset.x} ${number(a)}\n${svg.dataset.y} ${number(b)}` };
        });
      });
    const mark = document.createElementNS(svg.namespaceURI, "circle");
    mark.setAttribute("class", "mark");
    mark.setAttribute("r", 7);
    interactive(svg, points, {
      label: svg.getAttribute("aria-label"),
      size: () => [svg.viewBox.baseVal.width, svg.viewBox.baseVal.height],
      next: (from, key) => {
        if (map) return towards(points, from, key);
        const { x, series } = points[from];
        if (key === "ArrowLeft" || key === "ArrowRight") {  // along its curve
          const to = from + (key === "ArrowRight" ? 1 : -1);
          return points[to]?.series === series ? to : from;
        }
        if (key !== "ArrowUp" && key !== "ArrowDown") return undefined;
        const other = series + (key === "ArrowDown" ? 1 : -1);  // of the next curve, the point at that x
        const its = points.map((p, i) => [Math.abs(p.x - x), i]).filter(([, i]) => points[i].series === other);
        return its.length ? its.reduce((a, b) => b[0] < a[0] ? b : a)[1] : from;
      },
      show: (point, x, y) => {
        mark.setAttribute("cx", point.x);
        mark.setAttribute("cy", point.y);
        svg.append(mark);
        tell(point.text, x, y, map && data.map?.tiles ? tile(point.i) : null);
      },
      hide: () => mark.remove(),
    });
  }

  function tile(i) {
    const { tiles, across, count } = data.map, element = document.createElement("i");
    const size = 96, row = Math.floor(i / across), column = i % across;
    element.style.background = `url(${tiles}) ${-size * column}px ${-size * row}px / ${size * across}px ${size * Math.ceil(count / across)}px`;
    return element;
  }

  // --- mistakes: rows of [image's key, name, part, label, taken for, score, the label's, parts that test it]

  const mistakes = data.mistakes?.rows || [], classes = data.mistakes?.classes || [];
  const named = k => typeof k === "number" ? classes[k] : k ?? "";

  for (const save of all("button[data-do=csv]")) {
    save.hidden = false;
    save.addEventListener("click", () => {
      const quoted = cell => /[",\n\r]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
      const lines = mistakes.map(([, name, part, k, j, score, own]) => [name, data.mistakes.parts[part], named(k), named(j), score ?? "", own ?? ""]);
      const text = [data.mistakes.columns, ...lines].map(line => line.map(cell => quoted(String(cell))).join(",") + "\n").join("");
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = "mistakes.csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  // --- confusions: the images of a cell ------------------------------------------------------------

  const panel = document.querySelector(".panel"), MOST = 200;
  let opener = null;

  // a cell: of label k, taken for j, n times, m images; on the diagonal n right of N
  const cells = (data.confusions?.cells || []).map(([k, j, n, m]) => ({ k, j, n, m }));
  cells.push(...(data.confusions?.labels || []).map(([n, N, m], k) => ({ k, j: k, n, N, m })).filter(({ N }) => N));
  const times = data.mistakes?.parts.length > 1 ? " times" : "";
  const said = ({ k, j, n, N, m }, between = ", ") => k === j
    ? `${classes[k]}: ${n.toLocaleString("en")} of ${N.toLocaleString("en")}${times} right`
    : `${classes[k]}${between}taken for ${classes[j]}: ${images(m)}${n > m ? `, ${n.toLocaleString("en")} times` : ""}`;

  // the pictures of a class that are right; one of an image may stand in several places
  function right(k) {
    const found = new Map();
    for (const kind of [".sides", ".strip"])
      for (const figure of all(`${kind} .right > figure[data-image$="/${k}"]`))
        if (!found.has(figure.dataset.image)) found.set(figure.dataset.image, figure.cloneNode(true));
    return { figures: [...found.values()], lines: [] };
  }

  // of mistakes each image once, by its worst score, with its picture where one stands anywhere on the page
  function wrong({ k, j, n }) {
    const rows = mistakes.filter(row => row[3] === k && row[4] === j), of = new Map();
    for (const row of rows) of.set(row[0], [...of.get(row[0]) || [], row]);
    const figures = [], lines = [];
    for (const [key, [[, name, , , , score, own, tests], ...again]] of of) {
      const scores = `${classes[j]} ${signed(score)}, ${classes[k]} ${signed(own)}`;
      // how often is known where all mistakes of the cell are here
      const often = tests > 1 && rows.length === n ? `in ${again.length + 1} of its ${tests} tests` : "";
      const image = document.querySelector(`figure[data-image^="${key}/"] img:not(.overlay)`);
      if (!image) {
        lines.push(`${name}: ${scores}${often && `; ${often}`}`);
        continue;
      }
      const figure = make("figure"), caption = make("figcaption");
      caption.append(make("span", "", scores), make("span", "", often), make("span", "name", name));
      figure.append(image.cloneNode(), caption);
      figures.push(figure);
    }
    return { figures, lines };
  }

  function open(cell, from) {
    opener = from;
    const { figures, lines } = cell.k === cell.j ? right(cell.k) : wrong(cell);
    const pictures = make("div", `pictures ${cell.k === cell.j ? "right" : "wrong"}`);
    pictures.append(...figures);
    panel.replaceChildren(make("h3", "", said(cell)), pictures);
    const listed = lines.slice(0, MOST), left = cell.m - figures.length - listed.length;
    if (listed.length) {
      const list = make("ul", "soft");
      list.append(...listed.map(line => make("li", "", line)));
      panel.append(list);
    }
    if (left > 0) panel.append(make("p", "soft", `${images(left)}${left < cell.m ? " more" : ""} ${left === 1 ? "isn't" : "aren't"} on this page.`));
    const close = make("button", "", "Close");
    close.type = "button";
    close.addEventListener("click", shut);
    panel.append(close);
    panel.hidden = false;
    panel.focus({ preventScroll: true });
    panel.scrollIntoView({ block: "nearest" });
  }
  const shut = () => { panel.hidden = true; opener?.focus(); };
  panel?.addEventListener("keydown", event => { if (event.key === "Escape") shut(); });

  for (const table of all("table.confusion")) {
    const rows = all("tbody tr", table).map(row => all("td", row));
    rows.forEach((line, k) => line.forEach((cell, j) => {
      const its = cells.find(each => each.k === k && each.j === j) || { k, j, n: 0, N: 0, m: 0 };
      const choose = () => { if (its.n) open(its, cell); };
      cell.tabIndex = k || j ? -1 : 0;  // one stop of Tab; arrow keys go on from there
      cell.setAttribute("role", "button");
      cell.setAttribute("aria-label", said(its));
      cell.addEventListener("click", choose);
      cell.addEventListener("keydown", event => {
        if (event.key === "Enter" || event.key === " ") choose();
        else if (event.key in WAYS) {
          const [across, down] = WAYS[event.key], to = rows[k + down]?.[j + across];
          if (to) { cell.tabIndex = -1; to.tabIndex = 0; to.focus(); }
        } else return;
        event.preventDefault();
      });
    }));
  }

  for (const box of all(".matrix")) {
    const K = Number(box.dataset.side), mark = document.createElement("i"), REACH = 6;
    const points = cells.map(cell => ({ ...cell, x: cell.j + .5, y: cell.k + .5 }));
    const place = new Map(points.map((p, i) => [p.k * K + p.j, i]));
    interactive(box, points, {
      label: box.firstElementChild.alt,
      size: () => [K, K],
      next: (from, key) => key in WAYS ? towards(points, from, key) : undefined,
      find: (x, y, unit) => {  // the cell itself, or where cells are too small to be met, one within reach
        const i = place.get(Math.floor(y) * K + Math.floor(x));
        return i === undefined && REACH * unit > 1 ? [nearest(points, x, y, REACH * unit), true] : [i, false];
      },
      show: (cell, left, top, near) => {
        mark.style.left = `${100 * cell.x / K}%`;
        mark.style.top = `${100 * cell.y / K}%`;
        box.append(mark);
        tell(`${said(cell, "\n")}${near ? "\nThe ring marks it, the nearest." : ""}`, left, top);
      },
      hide: () => mark.remove(),
      choose: cell => open(cell, box),
    });
  }
})();
