// Learning curves: one uPlot panel per question, one cursor for all of them; a click opens the groups of its step.

/** title, what to look for, metrics ("prefix*" takes all that begin so, "prefix*end" of these what ends so), and
    whether they are shares of one */
const PANELS = [
  ["Total reward", "mean R over the rollouts of a step", ["reward_total"]],
  ["Reward components", "each in 0..1 before its weight", ["reward_*"]],
  [
    "Accuracy",
    "of rollouts while training, and on held-out questions",
    ["reward_accuracy", "reward_accuracy(*", "eval_accuracy", "eval_*", "eval/*/accuracy"],
    true,
  ],
  [
    "Listening",
    "accuracy with the sound and with silence: the gap is what the sound is worth",
    ["listen_real", "listen_silent", "listen_*"],
    true,
  ],
  ["Completion length", "tokens", ["completion_length"]],
  ["Groups without variance", "share of groups from which nothing is learned", ["zero_variance_groups"], true],
  ["Truncated and broken", "share that hit the limit, share without the blocks", ["truncated", "format_broken"], true],
  [
    "Wrong outranks right",
    "share of pairs in which a wrong answer earned more than a right one",
    ["rewards/wrong_outranks_right"],
    true,
  ],
  ["KL to the start", "nats per token", ["kl", "kl/mean"]],
  ["Entropy", "nats per token", ["entropy", "entropy/mean"]],
  [
    "Engine mismatch",
    "log-prob when sampled against when scored",
    ["sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"],
  ],
  ["Engine distance", "KL of the engine from the policy, nats per token: above 0.01 look at it", ["engine/kl_k3"]],
  ["Effective sample", "what the rollouts are worth after weighing: 1 if the policy sampled", ["engine/ess"], true],
  [
    "Clipped ratios",
    "share of tokens",
    ["clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean", "engine/truncated_share"],
    true,
  ],
  ["Gradient norm", "before clipping", ["grad_norm"]],
  ["Seconds by phase", "of a step", ["seconds.*"]],
];
const NEVER_MIND_ZERO = new Set(["Clipped ratios"]); // as they are on policy
const NOT_COMPONENTS = new Set(["reward_total"]);
const isPhase = (key) => key.startsWith("seconds.") && !key.startsWith("seconds.reward_") && key !== "seconds.step";

/** The metrics of a run by name, each a list over its steps. */
function columns(run) {
  const rows = run.metrics.filter((row) => isNumber(row.step)).sort((a, b) => a.step - b.step);
  const names = new Set();
  const flat = rows.map((row) => {
    const seconds = row.seconds && typeof row.seconds === "object" ? row.seconds : {};
    const all = { ...row };
    for (const [phase, value] of Object.entries(seconds)) all[`seconds.${phase}`] = value;
    for (const [name, value] of Object.entries(all)) if (isNumber(value)) names.add(name);
    return all;
  });
  const series = Object.create(null); // a metric may be called constructor
  for (const name of names) series[name] = flat.map((row) => (isNumber(row[name]) ? row[name] : null));
  return { steps: rows.map((row) => row.step), series };
}

function expand(keys, names) {
  const chosen = new Set();
  for (const key of keys) {
    if (!key.includes("*")) {
      if (names.has(key)) chosen.add(key);
      continue;
    }
    const [start, end] = key.split("*");
    for (const name of names) {
      if (!name.startsWith(start) || !name.endsWith(end) || NOT_COMPONENTS.has(name)) continue;
      if (key !== "seconds.*" || isPhase(name)) chosen.add(name);
    }
  }
  return [...chosen];
}

const shortName = (key) => visible(key.replace(/^(reward_|seconds\.|rewards\/|sampling\/)/, "").replace(/_/g, " "));
const STEPS = [0, 1, 2, 3, 4, 5, 6].flatMap((power) => [1, 2, 5].map((part) => part * 10 ** power));
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3]];

class Charts {
  constructor(root, runs, onStep) {
    Object.assign(this, { root, runs, onStep, plots: [], rest: null });
    this.data = runs.map(columns);
    this.steps = [...new Set(this.data.flatMap((run) => run.steps))].sort((a, b) => a - b);
    this.names = new Set(this.data.flatMap((run) => Object.keys(run.series)));
    new ResizeObserver(() => this.resize()).observe(root);
  }

  draw() {
    this.plots.forEach((plot) => plot.destroy());
    this.plots = [];
    const shown = new Set(["step"]);
    const figures = PANELS.map(([title, text, keys, share]) => {
      const names = expand(keys, this.names);
      names.forEach((name) => shown.add(name));
      return names.length && (this.varies(names) || !NEVER_MIND_ZERO.has(title))
        ? this.figure(title, text, names, share)
        : null;
    });
    const others = [...this.names].filter((name) => !shown.has(name) && this.varies([name])).sort();
    this.root.replaceChildren(...figures.filter(Boolean));
    if (!figures.some(Boolean)) this.root.append(el("p", { class: "quiet" }, "The run has logged no metrics yet."));
    if (others.length) this.root.append(this.others(others));
  }

  varies(names) {
    return names.some((name) => this.data.some((run) => (run.series[name] || []).some((value) => value)));
  }

  others(names) {
    const grid = el("div", { class: "charts" });
    const open = () => grid.childElementCount || grid.append(...names.map((name) => this.figure(name, "", [name])));
    const fold = el(
      "details",
      { class: "others", on: { toggle: () => (this.rest = fold.open) && open() } },
      el("summary", {}, `${names.length} further metrics`),
      grid,
    );
    fold.open = Boolean(this.rest);
    return fold;
  }

  figure(title, text, names, share) {
    const area = el("div", { class: "plot" });
    const legend = el("div", { class: "legend" });
    const figure = el(
      "figure",
      { class: "card chart", "aria-label": this.summary(title, names), role: "img" },
      el("figcaption", {}, said("strong", "", title), el("span", { class: "quiet" }, text)),
      legend,
      area,
    );
    if (names.length === 1 && this.runs.length === 1) figure.classList.add("single");
    const lines = this.runs.flatMap((run, r) =>
      names
        .filter((name) => this.data[r].series[name])
        .map((name) => {
          const tone = names.length === 1 ? r : names.indexOf(name);
          return { run: r, name, color: cssColor(`--c${tone % 8}`), dash: names.length === 1 ? [] : DASHES[r % 4] };
        }),
    );
    const values = lines.map((line) => {
      const label =
        (names.length === 1 ? "" : shortName(line.name) + " ") + (this.runs.length > 1 ? runLetter(line.run) : "");
      const value = el("b", {}, number(this.last(line)));
      const swatch = el("i", {
        class: "swatch",
        style: { "border-top-color": line.color, "border-top-style": line.dash.length ? "dashed" : "solid" },
      });
      legend.append(el("span", {}, swatch, label, value));
      return value;
    });
    queueMicrotask(() => this.plot(area, lines, values, share));
    return figure;
  }

  last(line) {
    return this.data[line.run].series[line.name].findLast(isNumber);
  }

  summary(title, names) {
    const parts = this.runs.flatMap((run, r) =>
      names
        .filter((name) => this.data[r].series[name])
        .map((name) => {
          const values = this.data[r].series[name].filter(isNumber);
          return `${shortName(name)} from ${number(values[0])} to ${number(values.at(-1))}`;
        }),
    );
    return visible(`${title}: ${parts.join(", ")}`);
  }

  plot(area, lines, values, share) {
    if (!area.isConnected || !area.clientWidth) return;
    const at = this.data.map((run) => new Map(run.steps.map((step, i) => [step, i])));
    const data = [
      this.steps,
      ...lines.map((line) =>
        this.steps.map((step) => this.data[line.run].series[line.name][at[line.run].get(step)] ?? null),
      ),
    ];
    const ink = cssColor("--quiet"),
      grid = { stroke: cssColor("--line"), width: 1 },
      font = "11px " + cssColor("--sans");
    const axis = { stroke: ink, grid, ticks: { show: false }, font };
    const tick = (u, splits, i, space, step) => splits.map((value) => tickText(value, step));
    const few = (line) => data[lines.indexOf(line) + 1].filter(isNumber).length < 25;
    const plot = new uPlot(
      {
        width: area.clientWidth,
        height: 150,
        legend: { show: false },
        scales: { x: { time: false }, y: { range: range(share) } },
        axes: [
          { ...axis, size: 20, gap: 2, space: 50, incrs: STEPS },
          { ...axis, size: 44, gap: 4, space: 34, values: tick },
        ],
        padding: [8, 10, 0, 0],
        series: [
          {},
          ...lines.map((line) => ({
            stroke: line.color,
            width: 1.75,
            dash: line.dash,
            spanGaps: true,
            points: { show: few(line), size: 5, fill: line.color },
          })),
        ],
        cursor: { sync: { key: "step" }, y: false, points: { size: 7 } },
        hooks: {
          setCursor: [
            (u) =>
              values.forEach((value, i) => {
                value.textContent = number(u.cursor.idx == null ? this.last(lines[i]) : data[i + 1][u.cursor.idx]);
              }),
          ],
        },
      },
      data,
      area,
    );
    plot.over.addEventListener("click", () => {
      if (plot.cursor.idx != null && plot.select.width < 3) this.onStep(this.steps[plot.cursor.idx]);
    });
    plot.over.title = "click: the groups of this step; drag: zoom; double click: all";
    this.plots.push(plot);
  }

  resize() {
    for (const plot of this.plots) {
      const width = plot.root.parentElement?.clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: plot.height });
    }
  }
}

/** As many decimals as the step between ticks needs. */
function tickText(value, step) {
  if (value === 0) return "0";
  if (step < 1e-3 || Math.abs(value) >= 1e5) return number(value);
  return value.toFixed(Math.max(0, -Math.floor(Math.log10(step) + 1e-9))).replace("-", "−");
}

/** The y axis: shares between 0 and 1 keep an honest zero; others get a margin; a level line gets room. */
const range = (share) => (u, low, high) => {
  if (low == null) return [0, 1];
  if (share) return [0, Math.max(high * 1.08, 0.02) > 0.8 ? 1.02 : Math.max(high * 1.15, 0.02)];
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low >= 0 && low < high * 0.5 ? 0 : low - margin, high + margin];
};
