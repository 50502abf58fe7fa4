// A rollout as a card: verdict, advantage, reasoning, answer, components with their reasons, log-probs of tokens.

/** how completions are shown: [label, what it is] */
const TEXTS = {
  parts: ["reasoning", "reasoning and answer"],
  tokens: ["log-probs", "tokens, tinted the more the less likely they were"],
  raw: ["raw", "as the model wrote it"],
};

const isTimed = (rollout) => "speech" in rollout;

/** The component `accuracy`, which may have been given with arguments. */
const accuracyOf = ({ rewards }) => rewards[Object.keys(rewards).find((name) => name.split("(")[0] === "accuracy")];

/** right, wrong or ungraded: by accuracy, or, of a rollout that only says when, by whether it lost no component whole */
function verdict(rollout) {
  const scores = isTimed(rollout) ? Object.values(rollout.rewards) : [accuracyOf(rollout)];
  const graded = scores.filter(isNumber);
  if (!graded.length) return ["ungraded", "–", "not graded"];
  const least = Math.min(...graded);
  return (isTimed(rollout) ? least > 0 : least >= 0.5) ? ["right", "✓", "right"] : ["wrong", "✗", "wrong"];
}

function advantageChip(advantage) {
  const strength = Math.min(Math.abs(advantage) / 2, 1);
  const side = advantage > 0 ? "--plus" : "--minus";
  return el(
    "span",
    {
      class: "advantage",
      title: "advantage",
      style: { background: `color-mix(in srgb, var(${side}) ${Math.round(strength * 55)}%, transparent)` },
    },
    "A ",
    signed(advantage),
  );
}

/** Pieces tinted by what they cost: clear at p = 1, full at p = e^-5. */
function tokenText([pieces, centinats]) {
  const text = el("div", { class: "text tokens", dir: "auto" });
  pieces.forEach((piece, i) => {
    const logp = centinats[i] / 100;
    const node = said("span", "token", piece);
    node.removeAttribute("dir");
    node.style.setProperty("--cost", `${Math.round(Math.min(-logp / 5, 1) * 85)}%`);
    node.title = `p ${Math.exp(logp).toFixed(3)}, log p ${number(logp)}`;
    text.append(node);
  });
  return text;
}

const tokenLegend = () =>
  el("div", { class: "token-legend" }, "p = 1", el("i", { class: "ramp", "aria-hidden": "true" }), "p ≤ 0.007");

function texts(rollout, view) {
  if (view === "tokens" && rollout.tokens) return [tokenText(rollout.tokens)];
  const parts = view === "parts" && (rollout.think !== null || rollout.answer !== null);
  if (!parts) return [said("div", "text completion", rollout.completion)];
  return [
    rollout.think === null
      ? el("p", { class: "quiet" }, "no reasoning block")
      : said("div", "text think", rollout.think),
    rollout.answer === null
      ? el("p", { class: "quiet" }, "no answer block")
      : said("div", "text answer", rollout.answer),
  ];
}

function components(rollout) {
  const rows = Object.entries(rollout.rewards).map(([name, value]) => {
    const reason = Object.hasOwn(rollout.reasons, name) && rollout.reasons[name];
    return el(
      "div",
      { class: "component" },
      said("dt", "", name),
      el(
        "dd",
        {},
        el("meter", {
          min: 0,
          max: 1,
          value: isNumber(value) ? value : 0,
          "aria-hidden": "true",
          class: isNumber(value) ? null : "none",
        }),
        el("b", {}, isNumber(value) ? number(value) : "none"),
      ),
      reason ? said("dd", "reason", reason) : null,
    );
  });
  return el("dl", { class: "components" }, rows);
}

/** What of a reply is sound: its player, and as the model wrote it the codes. */
function speech(rollout, view, playerOf) {
  if (!rollout.codes) return [];
  return [
    rollout.reply ? playerOf(rollout.reply) : null,
    view === "raw" ? said("div", "text codes", rollout.codes.join(" ")) : null,
  ];
}

function rolloutCard(rollout, g, view, marked, playerOf) {
  const [kind, sign, name] = verdict(rollout);
  const facts = [
    rollout.length === null ? null : plural(rollout.length, isTimed(rollout) ? "chunk" : "token"),
    rollout.codes ? plural(rollout.codes.length, "audio code") : null,
    isNumber(rollout.logp) ? `mean log p ${fixed(rollout.logp)}` : null,
    rollout.stop === "length" ? "stopped at the limit" : null,
  ].filter(Boolean);
  const chips = (rollout.flags || [])
    .filter((flag) => FLAGS[flag])
    .map((flag) => el("span", { class: "flag", title: FLAGS[flag][1] }, FLAGS[flag][0]));
  const reasons = Object.values(rollout.reasons).join("\n"); // the format's are the parser's words
  const problems = rollout.problems.filter((problem) => !reasons.includes(problem));
  return el(
    "article",
    {
      class: `card rollout ${kind}${rollout.bits & marked ? " marked" : ""}`,
      "data-g": g,
      "aria-label": `rollout ${g + 1}, ${name}`,
    },
    el(
      "header",
      {},
      el("span", { class: "verdict", title: name }, sign),
      el("span", { class: "number" }, `${g + 1}`),
      el("span", { class: "total" }, "R ", el("b", {}, fixed(rollout.total))),
      advantageChip(rollout.advantage),
    ),
    chips.length ? el("div", { class: "flags" }, chips) : null,
    view === "tokens" && !rollout.tokens ? el("p", { class: "quiet" }, "no log-probs of tokens here") : null,
    texts(rollout, view),
    speech(rollout, view, playerOf),
    components(rollout),
    problems.length
      ? el(
          "ul",
          { class: "problems" },
          problems.map((problem) => said("li", "", problem)),
        )
      : null,
    el("footer", { class: "quiet" }, facts.join(" · ")),
  );
}
