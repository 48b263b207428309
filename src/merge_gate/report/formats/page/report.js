// Sorting, filtering, and the maps of report.html. Text goes into the page as text only (textContent), never as HTML.
"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const make = (tag, className = "", text = "") => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== "") element.textContent = text;
    return element;
  };
  document.documentElement.classList.add("js"); // at once: what is closed must not be laid out first
  document.addEventListener("DOMContentLoaded", () => one("#table") && start(one("#table")));

  const start = (table) => {
    const adapters = all("tbody.adapter", table);
    const layouts = JSON.parse(one("#layouts").textContent);

    // --- open and close -----------------------------------------------------------------------------------------------

    const open = (adapter, wanted) => {
      adapter.classList.toggle("opened", wanted);
      one(".open", adapter).setAttribute("aria-expanded", String(wanted));
      if (wanted) complete(adapter);
    };
    const address = (hash) => window.history.replaceState(null, "", hash || location.pathname + location.search);
    for (const adapter of adapters) {
      const name = one(".name", adapter);
      const button = make("button", "open", name.textContent);
      button.type = "button";
      button.setAttribute("aria-expanded", "false");
      name.replaceWith(button);
      one(".line", adapter).addEventListener("click", () => {
        if (String(window.getSelection())) return;
        const wanted = !adapter.classList.contains("opened");
        open(adapter, wanted);
        if (wanted) address(`#${adapter.id}`);
        else if (location.hash === `#${adapter.id}`) address("");
      });
    }

    // What an opened row gets: its maps, what its checks mean, and a button for its command.
    const complete = (adapter) => {
      if (adapter.dataset.complete) return;
      adapter.dataset.complete = "yes";
      for (const place of all(".map", adapter)) draw(place);
      for (const finding of all(".finding[data-check]", adapter)) {
        const meaning = document.getElementById(`check-${finding.dataset.check}`);
        if (!meaning) continue;
        const copy = meaning.cloneNode(true);
        copy.removeAttribute("id");
        copy.open = false;
        one("summary", copy).textContent = `What ${finding.dataset.check} means`;
        finding.append(copy);
      }
      for (const command of all(".command", adapter)) {
        const button = make("button", "", "copy");
        button.type = "button";
        button.addEventListener("click", async () => {
          try {
            await navigator.clipboard.writeText(one("code", command).textContent);
            button.textContent = "copied";
          } catch {
            window.getSelection().selectAllChildren(one("code", command));
          }
        });
        command.append(button);
      }
    };

    // --- filter -------------------------------------------------------------------------------------------------------

    const filter = one("#filter");
    const texts = new Map(adapters.map((adapter) => [adapter, one(".line", adapter).textContent.toLowerCase()]));
    let pick = "";
    let cause = "";
    const fits = (adapter) =>
      (!pick || adapter.dataset.verdict === pick || (adapter.dataset.also ?? "").split(" ").includes(pick)) &&
      (!cause || adapter.dataset.causes.split(" ").includes(cause));
    const show = () => {
      const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const adapter of adapters) {
        const shown = fits(adapter) && wanted.every((word) => texts.get(adapter).includes(word));
        adapter.hidden = !shown;
        count += shown;
      }
      one("#shown").textContent = `${count} of ${adapters.length}`;
      one("#none").hidden = count > 0;
    };
    filter.addEventListener("input", show);
    const pressed = (buttons, isPressed) => {
      for (const button of buttons) button.setAttribute("aria-pressed", String(isPressed(button)));
    };
    const picks = all("[data-pick]");
    const causes = all("[data-cause]");
    for (const button of [...picks, ...causes]) {
      button.disabled = false;
      button.addEventListener("click", () => {
        if ("pick" in button.dataset) [pick, cause] = [button.dataset.pick, ""];
        else [pick, cause] = ["", cause === button.dataset.cause ? "" : button.dataset.cause];
        pressed(picks, (other) => !cause && other.dataset.pick === pick);
        pressed(causes, (other) => other.dataset.cause === cause);
        show();
      });
    }

    // --- sort ---------------------------------------------------------------------------------------------------------

    const ranks = { failed: 0, error: 1, accepted: 2, passed: 3 };
    const text = (selector) => (adapter) => one(selector, adapter).textContent.trim().toLowerCase();
    const keys = {
      name: text(".line th"),
      verdict: (adapter) => ranks[adapter.dataset.verdict],
      base: text(".base"),
      cause: (adapter) => text(".why")(adapter) || "\uffff",
      seconds: (adapter) => Number(one("[data-value]", adapter).dataset.value) || 0,
    };
    const compared = new Intl.Collator("en", { numeric: true }).compare;
    for (const button of all("[data-sort]")) {
      button.addEventListener("click", () => {
        const head = button.parentElement;
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of all("thead th", table)) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = keys[button.dataset.sort];
        const found = adapters.map((adapter) => [key(adapter), adapter]);
        found.sort(([a], [b]) => (up ? 1 : -1) * (typeof a === "number" ? a - b : compared(a, b)));
        table.append(...found.map(([, adapter]) => adapter));
      });
    }

    // --- maps ---------------------------------------------------------------------------------------------------------

    const STATES = { N: ["N", "NaN"], I: ["∞", "±Inf"], U: ["0", "no effect"], F: ["", "finite"], V: ["", "untouched"] };
    const figure = (value) => (value === null || value === undefined ? "not measured" : String(value));
    const share = (value) => {
      if (value === null || value === undefined) return "not measured";
      if (value > 0 && value < 0.0001) return "below 0.01 %";
      return `${Number((100 * value).toPrecision(3)).toLocaleString("en")} %`;
    };
    // For a cell of a small map.
    const short = (kind, value) => {
      if (kind !== "ratio") return `${Number((100 * value).toPrecision(2))}%`;
      return value < 1e4 ? String(Number(value.toPrecision(2))) : value.toExponential(1).replace("+", "");
    };
    const clamp = (value) => Math.min(Math.max(value, 0), 1);
    const KINDS = {
      state: { label: "state" },
      headroom: { label: "headroom used", title: "the largest value as a share of the dtype's largest value", ends: ["0", "the dtype's largest value"], tint: (value) => clamp(value) },
      ratio: { label: "‖ΔW‖/‖W‖", title: "the size of the adapter's change, relative to the base's weight", ends: ["1e-5", "10, logarithmic"], tint: (value) => (value > 0 ? clamp((Math.log10(value) + 5) / 6) : 0) },
      loss: { label: "rounding loss", title: "the share of the adapter's change that rounding to this dtype loses", ends: ["0", "all of ΔW"], tint: (value) => clamp(value) },
    };

    const headroom = (data, layout, index) => {
      const largest = layout.dtypes[layout.dtype[index]][1];
      const values = [data.low[index], data.high[index]].filter((value) => value !== null).map(Math.abs);
      return values.length && largest ? Number((Math.max(...values) / largest).toPrecision(3)) : null;
    };
    const valueOf = (kind, data, layout, index) =>
      kind === "headroom" ? headroom(data, layout, index) : data[kind][index];

    const describe = (data, layout, index) => {
      const dtype = layout.dtypes[layout.dtype[index]][0];
      const parts = [`${layout.names[index]} (${layout.shapes[index] || "scalar"}, ${dtype}): ${STATES[data.state[index]][1]}`];
      const broken = data.broken[index];
      if (broken) {
        const [nan, posinf, neginf, first] = broken;
        const counts = [[nan, "NaN"], [posinf, "+Inf"], [neginf, "-Inf"]].filter(([count]) => count);
        parts.push(counts.map(([count, name]) => `${count.toLocaleString("en")} ${name}`).join(", ") + (first.length ? `, the first at [${first.join(", ")}]` : ""));
      }
      parts.push(`finite values ${figure(data.low[index])} to ${figure(data.high[index])}`);
      parts.push(`headroom used ${share(headroom(data, layout, index))}`);
      const how = (value) => (value !== null && data.estimated.has(index) ? ", estimated from a sample" : "");
      parts.push(`‖ΔW‖/‖W‖ ${figure(data.ratio[index])}${how(data.ratio[index])}`);
      parts.push(`rounding loss ${share(data.loss[index])}${how(data.loss[index])}`);
      return parts.join("; ");
    };

    const legend = (list, kind, limits) => {
      list.replaceChildren();
      const item = (className, mark, label) => {
        const entry = make("li");
        entry.append(make("i", className, mark), label);
        list.append(entry);
      };
      if (kind === "state") {
        for (const letter of "NIUF") item(letter, ...STATES[letter]);
      } else {
        const [low, high] = KINDS[kind].ends;
        const entry = make("li");
        entry.append(`${low} `, make("i", "ramp"), high);
        list.append(entry);
        item("over", "!", `above the limit, ${short(kind, limits[kind])}`);
      }
      item("void", "", "untouched");
    };

    const paint = (cell, kind, data, layout) => {
      fill(cell, kind, data, layout);
      cell.setAttribute("aria-label", [cell.textContent, cell.dataset.description].filter(Boolean).join(", "));
    };

    const fill = (cell, kind, data, layout) => {
      const index = Number(cell.dataset.index);
      cell.style.background = "";
      const [mark] = STATES[data.state[index]];
      const untouched = data.state[index] === "V";
      if (kind === "state" || untouched || mark === "N" || mark === "∞") {
        cell.className = untouched ? "void" : data.state[index];
        cell.textContent = mark;
        return;
      }
      const value = valueOf(kind, data, layout, index);
      const over = value !== null && value > data.limits[kind];
      const tint = value === null ? 0 : KINDS[kind].tint(value);
      cell.className = value === null ? "unknown" : `h${over ? " over" : ""}${tint > 0.55 ? " dark" : ""}`;
      cell.textContent = value === null ? "?" : cell.closest(".numbers") ? short(kind, value) : over ? "!" : "";
      if (value !== null) cell.style.background = `rgb(var(--heat) / ${(0.06 + 0.94 * tint).toFixed(3)})`;
    };

    const grid = (block, data, layout, reader) => {
      const isSmall = block.layers.length <= 12 && block.modules.length <= 24;
      const heat = make("table", isSmall ? "heat numbers" : "heat");
      heat.setAttribute("role", "grid");
      if (block.stack) heat.append(make("caption", "", block.stack));
      const head = make("tr");
      head.append(make("td", "corner"));
      head.firstChild.style.cssText = "background:none;width:auto";
      const step = block.layers.length > 16 ? 4 : 1;
      block.layers.forEach((layer, at) => {
        const label = make("th");
        label.scope = "col";
        label.append(make("span", "unseen", "layer "), make("span", at % step ? "unseen" : "", layer));
        head.append(label);
      });
      const top = make("thead");
      if (block.layers.some(Boolean)) top.append(head);
      const cells = block.modules.map(() => block.layers.map(() => null));
      for (let at = 0; at < block.places.length; at += 3) cells[block.places[at + 1]][block.places[at + 2]] = block.places[at];
      const body = make("tbody");
      cells.forEach((row, down) => {
        const line = make("tr");
        const label = make("th", "", block.modules[down]);
        label.scope = "row";
        label.title = block.modules[down];
        line.append(label);
        row.forEach((index, across) => {
          const cell = make("td", "void");
          cell.tabIndex = -1;
          if (index === null) {
            const layer = block.layers[across];
            cell.dataset.description = `${layer ? `layer ${layer}, ` : ""}${block.modules[down]}: untouched by this adapter`;
          } else {
            cell.dataset.index = index;
            cell.dataset.description = describe(data, layout, index);
          }
          cell.setAttribute("aria-label", cell.dataset.description);
          line.append(cell);
        });
        body.append(line);
      });
      heat.append(top, body);
      const first = one("tbody td", heat);
      if (first) first.tabIndex = 0;
      listen(heat, reader);
      return heat;
    };

    const listen = (heat, reader) => {
      const cellOf = (event) => event.target.closest("td[data-description]");
      const read = (event) => {
        const cell = cellOf(event);
        if (cell) reader.textContent = cell.dataset.description;
      };
      heat.addEventListener("pointerover", read);
      heat.addEventListener("focusin", read);
      heat.addEventListener("click", (event) => {
        const cell = cellOf(event);
        if (cell) move(heat, cell);
      });
      heat.addEventListener("keydown", (event) => {
        const cell = cellOf(event);
        const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -Infinity], End: [0, Infinity] };
        const step = steps[event.key];
        if (!cell || !step) return;
        event.preventDefault();
        const rows = all("tbody tr", heat);
        const down = rows.indexOf(cell.parentElement);
        const line = rows[Math.min(Math.max(down + step[0], 0), rows.length - 1)];
        const across = Math.min(Math.max(cell.cellIndex + step[1], 1), line.cells.length - 1);
        move(heat, line.cells[across]);
      });
    };
    const move = (heat, cell) => {
      for (const other of all("td[tabindex='0']", heat)) other.tabIndex = -1;
      cell.tabIndex = 0;
      cell.focus();
    };

    // The tensor that matters most: one that is not finite, or else the largest figure of the map.
    const worst = (data, layout) => {
      const all_of = [...data.state].map((_, index) => index);
      const broken = ["N", "I"].map((letter) => data.state.indexOf(letter)).find((index) => index >= 0);
      if (broken !== undefined) return broken;
      const kind = data.kind === "state" ? "ratio" : data.kind;
      const size = (index) => valueOf(kind, data, layout, index) ?? -1;
      return all_of.reduce((most, index) => (size(index) > size(most) ? index : most), 0);
    };

    // Scrolls a map to a cell, and shows that there is more of it.
    const framed = (scroll, cell) => {
      const frame = make("div", "frame");
      const note = make("p", "scrolls", "Scroll sideways for all layers.");
      const edges = () => {
        const rest = scroll.scrollWidth - scroll.clientWidth;
        note.hidden = rest <= 1;
        frame.classList.toggle("more-right", scroll.scrollLeft < rest - 1);
      };
      scroll.addEventListener("scroll", edges, { passive: true });
      window.addEventListener("resize", edges);
      frame.append(scroll);
      requestAnimationFrame(() => {
        if (cell) scroll.scrollLeft = Math.max(cell.offsetLeft - scroll.clientWidth / 2, 0);
        edges();
      });
      return [frame, note];
    };

    let maps = 0;
    const draw = (place) => {
      maps += 1;
      const data = JSON.parse(one("script", place).textContent);
      data.estimated = new Set(data.estimated);
      const layout = layouts[data.layout];
      const reader = make("p", "read");
      reader.setAttribute("role", "status");
      const scroll = make("div", "scroll");
      scroll.append(...layout.blocks.map((block) => grid(block, data, layout, reader)));
      const list = make("ul", "legend");
      const choose = (kind) => {
        for (const cell of all("td[data-index]", scroll)) paint(cell, kind, data, layout);
        legend(list, kind, data.limits);
      };
      const kinds = make("fieldset", "kinds");
      kinds.append(make("legend", "", "Show"));
      for (const [kind, { label, title }] of Object.entries(KINDS)) {
        const choice = make("label");
        if (title) choice.title = title;
        const radio = make("input");
        Object.assign(radio, { type: "radio", name: `kind-${maps}`, value: kind, checked: kind === data.kind });
        radio.addEventListener("change", () => choose(kind));
        choice.append(radio, ` ${label}`);
        kinds.append(choice);
      }
      choose(data.kind);
      const first = worst(data, layout);
      const cell = all("td[data-index]", scroll).find((candidate) => Number(candidate.dataset.index) === first);
      reader.textContent = `Worst tensor: ${describe(data, layout, first)}`;
      place.append(kinds, ...framed(scroll, cell), list, reader);
    };

    // --- at the start, from an address, and on paper ----------------------------------------------------------------------

    const byAddress = () => {
      const adapter = adapters.find((candidate) => `#${candidate.id}` === location.hash);
      if (!adapter) return;
      open(adapter, true);
      adapter.scrollIntoView();
    };
    window.addEventListener("hashchange", byAddress);
    window.addEventListener("beforeprint", () => {
      for (const adapter of adapters) if (adapter.dataset.verdict !== "passed" && !adapter.hidden) open(adapter, true);
    });
    one("#tools").hidden = false;
    const wrong = adapters.filter((adapter) => adapter.dataset.verdict !== "passed").length;
    if ((wrong > 0 && wrong < 10) || adapters.length === 1) open(adapters[0], true);
    byAddress();
    show();
  };
})();
