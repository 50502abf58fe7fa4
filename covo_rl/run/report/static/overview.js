// What a run came to: verdict, notes, advice; evaluations; configuration.

const evaluation = (run, when, mode) =>
  run.evaluations.find((row) => row.when === when && row.mode === mode && row.audio === "real");

function intervalBar(share) {
  const { accuracy, ci95 } = share,
    x = (value) => 100 * value;
  const bar = svg(
    "svg",
    { viewBox: "0 0 100 12", class: "interval", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { x: 0, y: 5.5, width: 100, height: 1, class: "scale" }),
  );
  if (ci95)
    bar.append(
      svg("rect", { x: x(ci95[0]), y: 3, width: Math.max(x(ci95[1] - ci95[0]), 0.5), height: 6, rx: 1, class: "span" }),
    );
  if (isNumber(accuracy))
    bar.append(svg("rect", { x: x(accuracy) - 0.6, y: 1, width: 1.2, height: 10, class: "mean" }));
  return bar;
}

const intervalText = ({ accuracy, ci95 }) =>
  (isNumber(accuracy) ? percent(accuracy) : "–") + (ci95 ? ` [${percent(ci95[0])}, ${percent(ci95[1])}]` : "");

/** of when a model speaks, in the result: name -> [label, how it is shown] */
const WHEN = {
  early_long_pause: ["early answers in long pauses, %", percent],
  single_turn_success: ["answers in time without pauses, %", percent],
  back_channel_ignored: ["back-channels ignored, %", percent],
  barge_in_success: ["barge-ins obeyed, %", percent],
  delay_p50: ["median delay of answers, s", fixed],
};

/** of a run that goes on, or stopped early, how far it is */
function stepsDone({ metrics }, steps) {
  const last = metrics.findLast((row) => isNumber(row.step))?.step ?? 0;
  return last === steps ? plural(steps, "step") : `${last} of ${plural(steps, "step")}`;
}

/** accuracy before -> after with intervals; R; what silence and swapped sounds leave */
function verdictCard(run, r, several) {
  const figure = (label, before, after, show, scale) =>
    el(
      "div",
      { class: "figure" },
      el("div", { class: "quiet" }, label),
      el("div", { class: "big" }, show(before), el("span", { class: "arrow" }, "→"), el("strong", {}, show(after))),
      scale,
    );
  const parts = [];
  for (const mode of ["greedy", "sampled"]) {
    const [before, after] = ["before", "after"].map((when) => evaluation(run, when, mode));
    if (!before && !after) continue;
    const rows = [
      ["before", before],
      ["after", after],
    ]
      .filter(([, share]) => share)
      .map(([when, share]) =>
        el(
          "div",
          { class: "scale-row" },
          el("span", {}, when),
          intervalBar(share),
          el("span", {}, intervalText(share)),
        ),
      );
    parts.push(figure(`held-out accuracy, ${mode}, %`, before?.accuracy, after?.accuracy, percent, rows));
  }
  const [before, after] = ["before", "after"].map((when) => evaluation(run, when, "sampled")?.rewards);
  if (isNumber(after?.total)) parts.push(figure("mean R, sampled", before?.total, after.total, fixed, null));
  const deaf = run.evaluations.filter((row) => row.audio !== "real");
  if (deaf.length)
    parts.push(
      el(
        "div",
        { class: "figure" },
        el("div", { class: "quiet" }, "without the right sound, %"),
        deaf.map((row) =>
          el(
            "div",
            { class: "scale-row" },
            el("span", {}, row.audio),
            intervalBar(row),
            el("span", {}, intervalText(row)),
          ),
        ),
      ),
    );
  const [first, last] = [run.result.before, run.result.after];
  for (const [name, [label, show]] of Object.entries(WHEN))
    if (isNumber(last?.[name])) parts.push(figure(label, first?.[name], last[name], show, null));
  const { model, data, max_steps: steps } = run.config;
  return el(
    "section",
    { class: "card verdict-card" },
    el(
      "header",
      {},
      several ? runBadge(r) : null,
      said("h2", "", run.name),
      said(
        "span",
        "quiet",
        [model, data ?? "built-in questions", steps && stepsDone(run, steps)].filter(Boolean).join(" · "),
      ),
    ),
    parts.length ? el("div", { class: "figures" }, parts) : el("p", { class: "quiet" }, "The run was not evaluated."),
  );
}

/** Text in which `code` is set apart. */
function coded(text) {
  const parts = text.split("`");
  return parts.length % 2 ? parts.map((part, i) => said(i % 2 ? "code" : "span", "", part)) : said("span", "", text);
}

/** A section of docs/troubleshooting.md: paragraphs, and lists as they stand. */
const adviceHelp = (text) =>
  el(
    "details",
    {},
    el("summary", {}, "what to do"),
    text.split(/\n{2,}/).map((paragraph) => el("p", {}, coded(paragraph.replace(/\n(?!- )\s*/g, " ")))),
  );

function adviceCard(payload, onStep) {
  const rows = payload.runs.flatMap((run, r) =>
    run.advice.map((advice) =>
      el(
        "li",
        {},
        payload.runs.length > 1 ? runBadge(r) : null,
        button(`step ${advice.step}`, () => onStep(advice.step, r), { class: "step-link" }),
        coded(advice.text),
        " ",
        advice.help ? adviceHelp(advice.help) : advice.link ? link("what to do", advice.link) : null,
      ),
    ),
  );
  return rows.length ? el("section", { class: "card advice" }, el("h2", {}, "Advice"), el("ul", {}, rows)) : null;
}

function table(head, rows, className = "") {
  const cell = (value, i) =>
    value instanceof Node
      ? el(i ? "td" : "th", { scope: i ? null : "row" }, value)
      : said(i ? "td" : "th", "", value ?? "–");
  return el(
    "div",
    { class: `table ${className}`, tabindex: 0, role: "region", "aria-label": "table" },
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((name) => said("th", "", name)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) => el("tr", {}, row.map(cell))),
      ),
    ),
  );
}

function evaluationTables(payload) {
  const several = payload.runs.length > 1;
  const columns = payload.runs.flatMap((run, r) =>
    run.evaluations.map((row) => ({ row, label: `${several ? runLetter(r) + " " : ""}${row.name}` })),
  );
  if (!columns.length) return [el("p", { class: "quiet" }, "No evaluation is in the run folder.")];
  const order = [...new Set(columns.map(({ row }) => row.name))];
  columns.sort((a, b) => order.indexOf(a.row.name) - order.indexOf(b.row.name)); // runs one below the other
  const names = [...new Set(columns.flatMap(({ row }) => Object.keys(row.rewards)))];
  const main = table(
    ["evaluation", "n", "accuracy %, 95 % Wilson interval", "", ...names],
    columns.map(({ row, label }) => [
      label,
      number(row.n),
      intervalText(row),
      intervalBar(row),
      ...names.map((name) => number(row.rewards[name])),
    ]),
  );
  const keys = [...new Set(columns.flatMap(({ row }) => row.breakdown.map((part) => part.column)))];
  const breakdowns = keys.map((column) => {
    const kinds = [
      ...new Set(
        columns.flatMap(({ row }) => row.breakdown.filter((part) => part.column === column).map((part) => part.value)),
      ),
    ];
    const shown = columns.filter(({ row }) => row.breakdown.length);
    const rows = kinds.map((value) => [
      value,
      ...shown.map(({ row }) => {
        const part = row.breakdown.find((one) => one.column === column && one.value === value);
        return part
          ? el(
              "div",
              { class: "share" },
              intervalText(part),
              intervalBar(part),
              el("span", { class: "quiet" }, `n ${part.n}`),
            )
          : "–";
      }),
    ]);
    return [said("h3", "", `by ${column}`), table([column, ...shown.map(({ label }) => label)], rows, "breakdown")];
  });
  return [main, ...breakdowns.flat()];
}

function setupTables(payload) {
  const letters = payload.runs.map((run, r) => (payload.runs.length > 1 ? `${runLetter(r)} ${run.name}` : "value"));
  const rowsOf = (part) => {
    const flat = payload.runs.map((run) => new Map(flatten(run[part])));
    return [...new Set(flat.flatMap((map) => [...map.keys()]))].filter(Boolean).map((key) => [
      key,
      ...flat.map((map) => map.get(key) ?? null),
    ]);
  };
  const blocks = [
    ["Configuration", "config"],
    ["Result", "result"],
    ["Environment", "environment"],
  ].map(([title, part]) => {
    const rows = rowsOf(part);
    return rows.length ? [el("h2", {}, title), table(["option", ...letters], rows, "setup")] : [];
  });
  const differing = payload.comparison?.config ?? [];
  const differences =
    payload.runs.length < 2
      ? []
      : [
          el("h2", {}, "What differs"),
          differing.length
            ? table(
                ["option", ...letters],
                differing.map((row) => [
                  row.option,
                  ...row.values.map((value) =>
                    value === null
                      ? null
                      : flatten(value)
                          .map(([key, text]) => (key ? `${key} ${text}` : text))
                          .join(", "),
                  ),
                ]),
                "setup differs",
              )
            : el("p", { class: "quiet" }, "The runs have the same options."),
        ];
  return [...differences, ...blocks.flat()];
}

function countLine({ counts, made }) {
  const parts = [plural(counts.rollouts, "rollout"), plural(counts.groups, "group"), plural(counts.steps, "step")];
  for (const [name, label] of [
    ["sounds_embedded", "in the page"],
    ["sounds_linked", "linked"],
    ["sounds_missing", "missing"],
  ]) {
    if (counts[name]) parts.push(`${plural(counts[name], "sound")} ${label}`);
  }
  for (const [name, label] of [
    ["tokens_left_out", "rollouts without log-probs of tokens"],
    ["steps_left_out", "steps left out"],
  ]) {
    if (counts[name]) parts.push(`${counts[name].toLocaleString("en")} ${label}`);
  }
  return visible([...parts, `made ${made}`].join(" · "));
}
