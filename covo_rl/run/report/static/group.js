// An open group: the question with its sound, its rollouts side by side, the same prompt over training.

const groupName = (payload, group) =>
  `${payload.runs.length > 1 ? runLetter(group.run) + " · " : ""}step ${group.step} · group ${group.group}`;

function choices(group) {
  if (!group.choices.length)
    return group.answer === null
      ? null
      : el("p", {}, el("span", { class: "quiet" }, "key "), said("b", "key", group.answer));
  const list = el(
    "ul",
    { class: "choices" },
    group.choices.map((choice) => {
      const key = choice === group.answer;
      return el(
        "li",
        { class: key ? "key" : null },
        said("span", "", choice),
        key ? el("span", { class: "quiet" }, " key") : null,
      );
    }),
  );
  const elsewhere = group.answer !== null && !group.choices.includes(group.answer);
  return elsewhere ? [list, el("p", {}, el("span", { class: "quiet" }, "key "), said("b", "key", group.answer))] : list;
}

/** Mean R of one row id at each step where it was drawn, one line per run; points open their groups. */
function promptCurve(payload, groups, current, onOpen) {
  const width = 560,
    height = 100,
    pad = 8,
    edge = 40,
    foot = 22;
  const scored = groups.filter((group) => isNumber(group.mean));
  if (scored.length < 2) return null;
  const steps = scored.map((group) => group.step),
    means = scored.map((group) => group.mean);
  const [left, right, low, high] = [Math.min(...steps), Math.max(...steps), Math.min(...means), Math.max(...means)];
  const x = (group) => edge + ((group.step - left) / (right - left || 1)) * (width - edge - pad);
  const y = (group) => height - foot - ((group.mean - low) / (high - low || 1)) * (height - foot - pad);
  const lines = payload.runs.map((_, run) => {
    const path = scored
      .filter((group) => group.run === run)
      .sort((a, b) => a.step - b.step)
      .map((group) => `${x(group)},${y(group)}`);
    return svg("polyline", { points: path.join(" "), style: { stroke: `var(--c${run % 8})` }, class: "line" });
  });
  const points = scored.map((group) => {
    return svg(
      "circle",
      {
        cx: x(group),
        cy: y(group),
        r: group === current ? 6 : 4,
        class: group === current ? "point now" : "point",
        style: { fill: `var(--c${group.run % 8})` },
        on: { click: () => onOpen(group) },
      },
      svg("title", {}, `${groupName(payload, group)}: mean R ${fixed(group.mean)}`),
    );
  });
  const label = (at, to, anchor, text) => svg("text", { x: at, y: to, "text-anchor": anchor }, text);
  const labels = [
    ...(high > low ? [label(edge - 10, pad + 4, "end", fixed(high))] : []),
    label(edge - 10, height - foot + 4, "end", fixed(low)),
    label(edge, height - 4, "start", `step ${left}`),
    ...(right > left ? [label(width - pad, height - 4, "end", `${right}`)] : []),
  ];
  return svg(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      class: "prompt-curve",
      role: "img",
      "aria-label": `mean R from ${fixed(means[0])} to ${fixed(means.at(-1))}`,
    },
    labels,
    lines,
    points,
  );
}

function promptHistory(payload, group, onOpen) {
  const groups = payload.byPrompt.get(group.prompt);
  if (groups.length < 2) return el("p", { class: "quiet history" }, "This prompt was drawn once.");
  const links = groups.map((other) =>
    button(
      `${payload.runs.length > 1 ? runLetter(other.run) + " " : ""}${other.step}: ${fixed(other.mean)}`,
      () => onOpen(other),
      {
        class: "visit",
        "aria-current": other === group ? "true" : null,
        "aria-label": `${groupName(payload, other)}, mean R ${fixed(other.mean)}`,
      },
    ),
  );
  return el(
    "section",
    { class: "history card" },
    el(
      "h3",
      {},
      `The same prompt over training`,
      el("span", { class: "quiet" }, ` drawn ${groups.length} times, mean R`),
    ),
    promptCurve(payload, groups, group, onOpen),
    el("div", { class: "visits" }, links),
  );
}

/** Which other group of the same prompt stands beside the open one. */
function besideChoice(payload, group, beside, onBeside) {
  // another run's first, then those of near steps
  const far = (other) => [other.run === group.run, Math.abs(other.step - group.step)];
  const others = payload.byPrompt.get(group.prompt).filter((other) => other !== group);
  others.sort((a, b) => far(a)[0] - far(b)[0] || far(a)[1] - far(b)[1]);
  if (!others.length) return null;
  const choose = el(
    "select",
    { id: "beside", on: { change: () => onBeside(choose.value === "" ? null : payload.groups[choose.value]) } },
    el("option", { value: "" }, "nothing"),
    others.map((other) => el("option", { value: other.index, selected: other === beside }, groupName(payload, other))),
  );
  return el("label", { class: "quiet beside", for: "beside" }, "same prompt beside: ", choose);
}

function summaryLine(group) {
  const kinds = group.rollouts.map((rollout) => verdict(rollout)[0]);
  const right = kinds.filter((kind) => kind === "right").length;
  const graded = kinds.filter((kind) => kind !== "ungraded");
  return [
    graded.length ? `${right} of ${graded.length} right` : "no accuracy",
    `mean R ${fixed(group.mean)}`,
    `spread ${fixed(group.spread)}`,
  ].join(" · ");
}

/** The rollouts as cards, first those that a filter means. */
function grid(group, view, marked, playerOf) {
  const first = ({ rollout }) => (rollout.bits & marked ? 0 : 1);
  const order = group.rollouts.map((rollout, g) => ({ rollout, g })).sort((a, b) => first(a) - first(b) || a.g - b.g);
  return el(
    "div",
    { class: "rollouts" },
    order.map(({ rollout, g }) => rolloutCard(rollout, g, view, marked, playerOf)),
  );
}

/** What the row says besides; a press shows the whole of one that is cut. */
function fact(...parts) {
  const toggle = () => node.setAttribute("aria-expanded", node.classList.toggle("whole"));
  const length = parts.reduce((sum, part) => sum + (part.textContent ?? part).length, 0);
  const node = length > 40 ? button(parts, toggle, { "aria-expanded": false }) : el("span", {}, parts);
  node.classList.add("fact");
  return node;
}

function groupView(payload, group, { beside, text, marked }, handlers) {
  const flags = (group.flags || [])
    .filter((flag) => FLAGS[flag])
    .map((flag) => el("span", { class: "flag", title: FLAGS[flag][1] }, FLAGS[flag][0]));
  const facts = Object.entries(group.columns).map(([name, value]) =>
    fact(said("span", "quiet", name), " ", said("span", "", value)),
  );
  const players = [];
  const playerOf = (key) => {
    players.push(new Player(payload.clips[key]));
    return players.at(-1).node;
  };
  const sounds = group.clips.map(playerOf);
  const cards = (shown) => [
    shown.timing ? timeline(shown, shown === group ? players[0] : undefined) : null,
    grid(shown, text, marked, playerOf),
  ];
  const modes = Object.entries(TEXTS).map(([mode, [label, title]]) =>
    button(label, () => handlers.onText(mode), { "aria-pressed": mode === text, title }),
  );
  const head = (shown) =>
    beside ? el("h3", {}, groupName(payload, shown), el("span", { class: "quiet" }, ` ${summaryLine(shown)}`)) : null;
  const node = el(
    "div",
    { class: "group" },
    el(
      "div",
      { class: "group-bar" },
      payload.runs.length > 1 ? runBadge(group.run) : null,
      el("h2", { tabindex: -1 }, groupName(payload, group)),
      said("span", "quiet row-id", group.id),
      flags,
      el(
        "span",
        { class: "moves" },
        button("↑", handlers.onPrevious, { "aria-label": "previous group", title: "previous group (k)" }),
        button("↓", handlers.onNext, { "aria-label": "next group", title: "next group (j)" }),
      ),
    ),
    el(
      "section",
      { class: "card prompt" },
      said("p", "question", group.question),
      choices(group),
      sounds,
      facts.length ? el("div", { class: "facts" }, facts) : null,
    ),
    el(
      "div",
      { class: "toolbar" },
      el("b", {}, summaryLine(group)),
      group.timing
        ? null
        : el("div", { class: "segments", role: "group", "aria-label": "how completions are shown" }, modes),
      text === "tokens" && !group.timing ? tokenLegend() : null,
      besideChoice(payload, group, beside, handlers.onBeside),
    ),
    beside
      ? el(
          "div",
          { class: "two" },
          [group, beside].map((shown) => el("div", { class: "column" }, head(shown), cards(shown))),
        )
      : cards(group),
    promptHistory(payload, group, handlers.onOpen),
  );
  return { node, players };
}
