// When the rollouts of a group stop: both channels, the hazard of each chunk, a bar for each stop, one playhead.

const CHUNK = 0.16;
/** what a model's stop is called: it stops listening, or speaking */
const stopName = (kind) => (kind === "pause" || kind === "single" ? "SHIFT" : "BREAK");
const inSeconds = (value) => `${fixed(value)} s`;

/** Where a span lies on a lane, in percent of its width. */
function placed(timing, start, end) {
  const at = (second) => (100 * Math.min(Math.max(second, 0), timing.seconds)) / timing.seconds;
  return { left: `${at(start)}%`, width: `${at(end ?? timing.seconds) - at(start)}%` };
}

function wordSpans(timing, channel) {
  const turns = timing.turns.filter((turn) => turn.channel === channel);
  return turns.map((turn) => {
    const word = said("span", `word ${channel}`, turn.text);
    word.title = visible(`${turn.text} ${fixed(turn.start)}–${inSeconds(turn.end)}`);
    Object.assign(word.style, placed(timing, turn.start, turn.end));
    return word;
  });
}

const pauseSpans = (timing) =>
  timing.pauses.map(([start, end]) =>
    el(
      "span",
      { class: "pause", style: placed(timing, start, end), title: `a pause of ${inSeconds(end - start)}` },
      inSeconds(end - start),
    ),
  );

/** The hazards as steps: of chunk k from 0.16 k to 0.16 (k + 1), at whose end it decides. */
function hazardCurve(timing) {
  const { hazards, first_chunk: first } = timing;
  const steps = hazards.map((hazard, k) => `L${k},${1 - (hazard ?? 0)} L${k + 1},${1 - (hazard ?? 0)}`);
  return el(
    "div",
    { class: "hazards", style: placed(timing, CHUNK * first, CHUNK * (first + hazards.length)) },
    svg(
      "svg",
      { viewBox: `0 0 ${hazards.length} 1`, preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("path", { d: `M0,1 ${steps.join(" ")} L${hazards.length},1 Z` }),
      svg("line", { x1: 0, x2: hazards.length, y1: 0.5, y2: 0.5 }),
    ),
  );
}

/** Rollouts that stop at the same time, the earliest first, those that never do last: [time, their places]. */
function stopTimes(group) {
  const places = new Map();
  group.rollouts.forEach((rollout, g) => places.set(rollout.time, [...(places.get(rollout.time) ?? []), g]));
  return [...places].sort(([a], [b]) => (a ?? Infinity) - (b ?? Infinity));
}

function stopLane(group, time, places) {
  const { timing } = group,
    rollout = group.rollouts[places[0]],
    [kind, sign] = verdict(rollout);
  const name = time === null ? `no ${stopName(timing.kind)}` : `${stopName(timing.kind)} at ${inSeconds(time)}`;
  const title = `rollouts ${places.map((g) => g + 1).join(", ")}: ${name}, R ${fixed(rollout.total)}`;
  return [
    [el("b", { class: kind }, sign), ` ${places.length}×`],
    el(
      "div",
      { class: `stop ${kind}`, title },
      rollout.speech ? el("span", { class: "speech", style: placed(timing, ...rollout.speech) }) : null,
      time === null ? el("span", { class: "never" }, name) : el("i", { style: placed(timing, time, time) }),
    ),
  ];
}

/** Lines through all lanes: the end of the user's turn, the onset of what he says while the model speaks. */
const timeMarks = (timing) =>
  [
    ["onset", timing.onset, timing.kind.replace("_", "-") + " begins"],
    ["turn-end", timing.turn_end, timing.onset === null ? "the user's turn ends" : "and ends"],
  ]
    .filter(([, at]) => isNumber(at))
    .map(([name, at, what]) =>
      el("span", { class: `mark ${name}`, style: placed(timing, at, at), title: `${inSeconds(at)}: ${what}` }),
    );

function timeAxis(timing) {
  const every = [1, 2, 5, 10, 30, 60, 300].find((step) => timing.seconds / step <= 12) ?? 600;
  const ticks = Array.from({ length: Math.floor(timing.seconds / every) + 1 }, (_, i) => i * every);
  return ticks.map((tick) => el("span", { class: "tick", style: placed(timing, tick, tick) }, `${tick} s`));
}

/** The lanes of a group under one clock; a click on them leads its sound there. */
function timeline(group, player) {
  const { timing } = group,
    name = stopName(timing.kind);
  const lanes = [
    ["user", [...pauseSpans(timing), ...wordSpans(timing, "user")], "channel"],
    ["model", wordSpans(timing, "model"), "channel"],
    [`P(${name})`, hazardCurve(timing), "curve"],
    ...stopTimes(group).map(([time, places]) => stopLane(group, time, places)),
    ["", timeAxis(timing), "axis"],
  ].filter(([label, parts]) => label !== "model" || parts.length);
  const head = el("div", { class: "head", hidden: true });
  const over = el("div", { class: "over" }, timeMarks(timing), player ? head : null);
  const readout = el("output", { class: "quiet" });
  const at = (event) => {
    const box = over.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * timing.seconds;
  };
  const read = (event) => {
    const hazard = timing.hazards[Math.floor(at(event) / CHUNK) - timing.first_chunk];
    readout.textContent = `${inSeconds(at(event))}${isNumber(hazard) ? ` · P(${name}) ${number(hazard)}` : ""}`;
  };
  if (player)
    player.onShow = (now) => {
      head.hidden = now <= 0 || now > timing.seconds;
      head.style.left = `${(100 * now) / timing.seconds}%`;
    };
  const summary = stopTimes(group).map(
    ([time, places]) => `${places.length} ${time === null ? "never" : inSeconds(time)}`,
  );
  return el(
    "figure",
    { class: "card timeline", role: "group", "aria-label": `${name} of the rollouts: ${summary.join(", ")}` },
    el(
      "figcaption",
      {},
      el("strong", {}, `When it says ${name}`),
      el("span", { class: "quiet" }, ` ${timing.kind.replace("_", "-")}, a bar for each stop: when the model sounds`),
      readout,
    ),
    el(
      "div",
      {
        class: "lanes",
        on: {
          pointermove: read,
          pointerleave: () => (readout.textContent = ""),
          click: (event) => player?.audio && player.seek(at(event) / player.seconds),
        },
      },
      lanes.flatMap(([label, parts, kind], i) => [
        el("span", { class: "lane-name", style: { "grid-row": i + 1 } }, label),
        el("div", { class: `lane ${kind ?? ""}`, style: { "grid-row": i + 1 } }, parts),
      ]),
      el("div", { class: "overlay", style: { "grid-row": `1 / span ${lanes.length}` } }, over),
    ),
  );
}
