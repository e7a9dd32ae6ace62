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
  function interactive(element, points, { label, size, next, show, hide, choose }) {
    if (!points.length) return;
    let current = -1;
    const place = () => element.getBoundingClientRect();
    const go = i => {
      current = i;
      const box = place(), [width, height] = size();
      show(points[i], box.left + points[i].x / width * box.width, box.top + points[i].y / height * box.height);
    };
    const leave = () => { tip.hidden = true; hide(); };
    const nearest = event => {
      const box = place(), [width, height] = size();
      const x = (event.clientX - box.left) / box.width * width, y = (event.clientY - box.top) / box.height * height;
      let best = 0, least = Infinity;
      points.forEach((p, i) => {
        const far = (p.x - x) ** 2 + (p.y - y) ** 2;
        if (far < least) [best, least] = [i, far];
      });
      return best;
    };
    element.tabIndex = 0;
    element.setAttribute("role", "application");
    element.setAttribute("aria-label", `${label}. Arrow keys tell its values.`);
    element.addEventListener("pointermove", event => go(nearest(event)));
    element.addEventListener("pointerleave", leave);
    element.addEventListener("blur", leave);
    element.addEventListener("focus", () => { if (element.matches(":focus-visible")) go(Math.max(current, 0)); });
    element.addEventListener("click", event => { go(nearest(event)); if (choose) choose(points[current]); });
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

  // --- mistakes: rows of [image's key, name, part, label, taken for, score, the label's score] -------

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

  function open(k, j, n, from) {
    opener = from;
    const rows = mistakes.filter(row => row[3] === k && row[4] === j);
    const keys = new Set(k === j ? data.confusions.right[k] : rows.map(row => row[0]));
    const shown = [...keys].map(key => [key, document.querySelector(`figure[data-image="${key}/${j}"]`)]).filter(([, figure]) => figure);
    const what = k === j ? `${classes[k]}, taken for what it is` : `${classes[k]}, taken for ${classes[j]}`;
    const pictures = make("div", `pictures ${k === j ? "right" : "wrong"}`);
    pictures.append(...shown.map(([, figure]) => figure.cloneNode(true)));
    const close = make("button", "", "Close");
    close.type = "button";
    close.addEventListener("click", shut);
    panel.replaceChildren(make("h3", "", `${what}: ${images(n)}`), pictures);
    const pictured = new Set(shown.map(([key]) => key));
    const others = rows.filter(row => !pictured.has(row[0]));
    if (others.length) {
      const list = make("ul", "soft");
      list.append(...others.slice(0, MOST).map(row => make("li", "",
        `${row[1]}: ${classes[j]} ${signed(row[5])}, ${classes[k]} ${signed(row[6])}`)));
      panel.append(list);
    }
    const listed = (k === j ? pictured.size : rows.length) - Math.max(0, others.length - MOST);
    if (n > listed) panel.append(make("p", "soft", `${images(n - listed)} more ${n - listed === 1 ? "isn't" : "aren't"} on this page.`));
    panel.append(close);
    panel.hidden = false;
    panel.focus({ preventScroll: true });
    panel.scrollIntoView({ block: "nearest" });
  }
  const shut = () => { panel.hidden = true; opener?.focus(); };
  panel?.addEventListener("keydown", event => { if (event.key === "Escape") shut(); });

  for (const table of all("table.confusion")) {
    const rows = all("tbody tr", table).map(row => all("td", row));
    rows.forEach((cells, k) => cells.forEach((cell, j) => {
      const n = Number(cell.textContent.replaceAll(",", "")) || 0;
      const choose = () => { if (n) open(k, j, n, cell); };
      cell.tabIndex = k || j ? -1 : 0;  // one stop of Tab; arrow keys go on from there
      cell.setAttribute("role", "button");
      cell.setAttribute("aria-label", `${classes[k]}, taken for ${classes[j]}: ${images(n)}`);
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
    const K = classes.length, mark = document.createElement("i");
    const points = (data.confusions?.cells || []).map(([k, j, n]) => ({ x: j + .5, y: k + .5, k, j, n }));
    interactive(box, points, {
      label: box.firstElementChild.alt,
      size: () => [K, K],
      next: (from, key) => key in WAYS ? towards(points, from, key) : undefined,
      show: ({ x, y, k, j, n }, left, top) => {
        mark.style.left = `${100 * x / K}%`;
        mark.style.top = `${100 * y / K}%`;
        box.append(mark);
        tell(`${classes[k]}\ntaken for ${classes[j]}: ${images(n)}`, left, top);
      },
      hide: () => mark.remove(),
      choose: ({ k, j, n }) => open(k, j, n, box),
    });
  }
})();
