// The payload: inflated once, then indexed by run, step, row id and flag.

/** name -> [label, what it says]; the filters, in the order they are shown */
const FLAGS = {
  wrong_high_thinking: ["wrong, high thinking", "a wrong answer whose thinking scored in the top quarter"],
  right_broken_reasoning: ["right, broken reasoning", "a right answer with low consistency, format or thinking"],
  consistency_missing: ["consistency missing", "consistency could not be graded"],
  truncated: ["truncated", "stopped at the length limit"],
  early_answer: ["early answers", "it answered before the user's turn was over"],
  no_answer: ["no answer", "it never answered"],
  longest: ["longest", "among the longest completions"],
  copy: ["copies", "another rollout of its group has the same text"],
  biggest_change: ["biggest change", "the prompts whose mean R changed most between two steps"],
  no_variance: ["no variance", "all rollouts of the group have the same R: nothing is learned from it"],
};

const BITS = Object.fromEntries(Object.keys(FLAGS).map((flag, i) => [flag, 1 << i]));
const bits = (flags) => (flags || []).reduce((sum, flag) => sum | (BITS[flag] || 0), 0);

async function inflate(base64) {
  const packed = atob(base64.trim());
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

/** Add to each group what lists and filters read: index, flag bits, mean and spread of R, right and wrong. */
function index(payload) {
  const byPrompt = new Map();
  payload.groups.forEach((group, i) => {
    const totals = group.rollouts.map((rollout) => rollout.total).filter(isNumber);
    group.index = i;
    group.rollouts.forEach((rollout) => (rollout.bits = bits(rollout.flags)));
    group.bits = group.rollouts.reduce((sum, rollout) => sum | rollout.bits, bits(group.flags));
    group.mean = mean(totals);
    group.spread = totals.length ? Math.sqrt(mean(totals.map((total) => (total - group.mean) ** 2))) : null;
    group.prompt = JSON.stringify([group.id, group.question]); // "1" may be a row of two data sets
    if (byPrompt.has(group.prompt)) byPrompt.get(group.prompt).push(group);
    else byPrompt.set(group.prompt, [group]);
  });
  payload.byPrompt = byPrompt;
  payload.steps = [...new Set(payload.groups.map((group) => group.step))].sort((a, b) => a - b);
  payload.flags = Object.keys(FLAGS).filter((flag) => payload.groups.some((group) => group.bits & BITS[flag]));
  return payload;
}

/** The text that a search reads, in lower case; made at the first search, or when the page is idle. */
function haystack(group) {
  group.hay ??= [group.id, group.question, ...group.rollouts.map((rollout) => rollout.completion)]
    .join("\n")
    .toLowerCase();
  return group.hay;
}

const SORTS = {
  step: ["by step", null],
  high: ["highest R", (a, b) => (b.mean ?? -Infinity) - (a.mean ?? -Infinity)],
  low: ["lowest R", (a, b) => (a.mean ?? Infinity) - (b.mean ?? Infinity)],
  spread: ["widest spread", (a, b) => (b.spread ?? -1) - (a.spread ?? -1)],
};

/** Groups, of one run or of all, that hold the query and every flag, each in some rollout; how many each flag has. */
function select(payload, { query = "", flags = [], run = null, sort = "step" }) {
  const wanted = bits(flags);
  const needle = query.trim().toLowerCase();
  const counts = Object.fromEntries(payload.flags.map((flag) => [flag, 0]));
  let groups = payload.groups.filter((group) => {
    if (run !== null && group.run !== run) return false;
    if ((group.bits & wanted) !== wanted) return false;
    if (needle && !haystack(group).includes(needle)) return false;
    for (const flag of payload.flags) if (group.bits & BITS[flag]) counts[flag]++;
    return true;
  });
  const order = SORTS[sort]?.[1];
  if (order) groups = groups.sort((a, b) => order(a, b) || a.index - b.index);
  return { groups, counts };
}

/** {a: {b: 1}} -> [["a.b", 1]]; lists and values as text */
function flatten(value, prefix = "") {
  if (value && typeof value === "object" && !Object.keys(value).length) return [[prefix, "none"]];
  if (value === null || typeof value !== "object") return [[prefix, value === null ? "none" : String(value)]];
  if (Array.isArray(value))
    return [
      [
        prefix,
        value.map((item) => (item && typeof item === "object" ? JSON.stringify(item) : String(item))).join(", "),
      ],
    ];
  return Object.entries(value).flatMap(([key, item]) => flatten(item, prefix ? `${prefix}.${key}` : key));
}
