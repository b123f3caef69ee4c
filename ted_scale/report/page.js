// Draws a chart when it comes into view, and gives it the theme's colours, the chosen x axis, and keys.
(() => {
  const data = JSON.parse(document.getElementById("all-runs").textContent);
  const drawn = new Map(); // figure element -> Bokeh's figure
  const viewOf = new Map(); // Bokeh's figure -> its view
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

  function theme() {
    const word = chosen("theme");
    return word === "system" ? (dark.matches ? "dark" : "light") : word;
  }

  function paint(plot) {
    const ink = data.inks[theme()], lines = data.lines[theme()];
    for (const axis of [...plot.left, ...plot.below]) {
      Object.assign(axis, {
        axis_label_text_color: ink.text, major_label_text_color: ink.text, axis_line_color: ink.soft,
        major_tick_line_color: ink.soft, minor_tick_line_color: null,
      });
    }
    for (const bar of plot.right) Object.assign(bar, { major_label_text_color: ink.text });
    for (const part of plot.center) {
      if ("grid_line_color" in part) part.grid_line_color = ink.grid;
      if (part.tags.length === 2 || part.name === "cursor") part.line_color = ink.soft;
    }
    for (const { glyph, tags } of plot.renderers) {
      if (!tags.length || glyph === undefined) continue;
      const colour = { value: lines[tags[0] % lines.length] };
      glyph.line_color = colour;
      if ("fill_color" in glyph) glyph.fill_color = colour;
    }
  }

  // Tokens or seconds at a step of a run, between the two rows beside it.
  function along(run, step) {
    const axis = chosen("axis"), times = data.times[run];
    if (axis === "steps" || run < 0 || !times) return step;
    const { steps } = times, values = times[axis];
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1; else high = middle;
    }
    if (low === 0 || steps[low] === steps[low - 1]) return values[low];
    const share = Math.min(1, (step - steps[low - 1]) / (steps[low] - steps[low - 1]));
    return values[low - 1] + share * (values[low] - values[low - 1]);
  }

  function place(plot) {
    if (plot.tags.includes("heat")) return;
    let overLayers = false;
    for (const { tags, data_source: source } of plot.renderers) {
      overLayers ||= tags[1] < 0;
      const step = source.data.step ?? source.data.x; // x are steps at first
      source.data = { ...source.data, step, x: Float64Array.from(step, (one) => along(tags[1], one)) };
    }
    for (const part of plot.center) {
      if (part.tags.length === 2) part.location = along(part.tags[1], part.tags[0]);
      if (part.name === "cursor") part.visible = false;
    }
    plot.below[0].axis_label = overLayers ? "pair" : chosen("axis").replace(/s$/, chosen("axis") === "steps" ? "" : "s");
    plot.reset.emit();
  }

  async function draw(element) {
    if (drawn.has(element)) return;
    drawn.set(element, null);
    const item = JSON.parse(element.querySelector("script.item").textContent);
    const views = await Bokeh.embed.embed_item(item, element.querySelector(".plot").id);
    const view = [...views][0], plot = view.model;
    drawn.set(element, plot);
    viewOf.set(plot, view);
    paint(plot);
    place(plot);
  }

  // The cursor of the keys: a place in the plot's range, and what each line has there.
  function nearest(source, x) {
    const xs = source.data.x;
    let best = 0;
    for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
    return source.data.y[best];
  }

  function read(element, plot, share) {
    const { start, end } = plot.x_range, x = start + share * (end - start);
    let cursor = plot.center.find((part) => part.name === "cursor");
    if (!cursor) {
      cursor = new (Bokeh.Models.get("Span"))({ dimension: "height", name: "cursor", line_width: 2 });
      plot.center = [...plot.center, cursor];
      paint(plot);
    }
    Object.assign(cursor, { location: x, visible: true });
    const values = new Set(plot.renderers.filter((r) => r.visible && r.tags.length).map((r) => {
      const value = nearest(r.data_source, x);
      return `${r.name} ${Number.isFinite(value) ? Number(value.toPrecision(4)) : "none"}`;
    }));
    element.querySelector(".readout").textContent = `${plot.below[0].axis_label} ${Math.round(x).toLocaleString("en")}: ${[...values].join(", ")}`;
  }

  function zoom(plot, share, factor) {
    const { start, end } = plot.x_range, middle = start + share * (end - start), half = ((end - start) * factor) / 2;
    // As a pointer's zoom does it: the view then fits the height to what is seen.
    const wanted = new Map([[plot.x_range, { start: middle - half, end: middle + half }]]);
    viewOf.get(plot).update_range({ xrs: wanted, yrs: new Map() }, { scrolling: true });
  }

  function onKey(element, event) {
    const plot = drawn.get(element);
    if (!plot || event.ctrlKey || event.metaKey || event.altKey) return;
    const share = Number(element.dataset.share ?? 0.5);
    const moves = { ArrowLeft: share - 0.02, ArrowRight: share + 0.02, Home: 0, End: 1 };
    if (event.key in moves) element.dataset.share = Math.min(1, Math.max(0, moves[event.key]));
    else if (event.key === "+" || event.key === "=") zoom(plot, share, 0.5);
    else if (event.key === "-") zoom(plot, share, 2);
    else if (event.key === "0") plot.reset.emit();
    else return;
    event.preventDefault();
    if (!plot.tags.includes("heat")) read(element, plot, Number(element.dataset.share ?? 0.5));
  }

  function toggle(element, button) {
    const plot = drawn.get(element), shown = button.getAttribute("aria-pressed") !== "true";
    if (!plot) return;
    button.setAttribute("aria-pressed", shown);
    for (const r of plot.renderers) if (r.tags[0] === Number(button.dataset.line)) r.visible = shown;
  }

  function dress() {
    document.documentElement.dataset.theme = theme();
    for (const plot of drawn.values()) if (plot) paint(plot);
  }

  const seen = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "400px" },
  );
  const elements = document.querySelectorAll("figure.chart");
  for (const element of elements) {
    element.querySelector(".plot").addEventListener("keydown", (event) => onKey(element, event));
    element.querySelectorAll(".legend button").forEach((button) => button.addEventListener("click", () => toggle(element, button)));
    seen.observe(element);
  }
  document.querySelectorAll("input[name=axis]").forEach((input) =>
    input.addEventListener("change", () => drawn.forEach((plot) => plot && place(plot))));
  document.querySelectorAll("input[name=theme]").forEach((input) => input.addEventListener("change", dress));
  dark.addEventListener("change", dress);
  addEventListener("beforeprint", () => elements.forEach(draw));
  dress();
})();
