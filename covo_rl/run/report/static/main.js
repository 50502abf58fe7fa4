// Start, views, the address that holds the state, keys, theme.

const VIEWS = ["overview", "groups", "evaluation", "setup"];

function readState() {
  const words = new URLSearchParams(location.hash.slice(1));
  const only = words.get("only");
  return {
    view: VIEWS.includes(words.get("view")) ? words.get("view") : "overview",
    at: words.get("at"),
    beside: words.get("beside"),
    q: words.get("q") ?? "",
    sort: words.get("sort") ?? "step",
    text: words.get("text") in TEXTS ? words.get("text") : "parts",
    flags: (words.get("flags") ?? "").split(",").filter((flag) => flag in FLAGS),
    only: /^\d+$/.test(only ?? "") ? Number(only) : null,
  };
}

function writeState(state) {
  const plain = { sort: "step", text: "parts", view: "overview" };
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    const text = Array.isArray(value) ? value.join(",") : value;
    if (text !== null && text !== undefined && text !== "" && text !== plain[name]) words.set(name, text);
  }
  return "#" + words;
}

class Page {
  constructor(payload) {
    this.payload = payload;
    this.parts = Object.fromEntries(VIEWS.map((view) => [view, document.getElementById(view)]));
    this.go = this.go.bind(this);
    const toStep = (step, run) => this.toStep(step, run);
    const several = payload.runs.length > 1;
    this.parts.overview.prepend(...payload.runs.map((run, r) => verdictCard(run, r, several)));
    const advice = adviceCard(payload, toStep);
    if (advice) document.getElementById("asides").prepend(advice);
    this.charts = new Charts(document.getElementById("charts"), payload.runs, toStep);
    this.browser = new Browser(this.parts.groups, payload, this.go);
    document.getElementById("counts").textContent = countLine(payload);
    window.addEventListener("hashchange", () => this.render());
    document.addEventListener("keydown", (event) => this.key(event));
    document.getElementById("theme").addEventListener("click", () => this.turnTheme());
    document.getElementById("help").addEventListener("click", () => this.help());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.charts.draw());
    this.render();
  }

  /** Change the state; `quiet` replaces the entry of the history rather than adding one. */
  go(changes, quiet = false) {
    const hash = writeState({ ...readState(), ...changes });
    if (hash === location.hash) return;
    if (quiet) history.replaceState(null, "", hash);
    else history.pushState(null, "", hash);
    this.render();
  }

  /** The first group of the step, or of the one nearest to it that was logged; of a run, if it has any. */
  toStep(step, run) {
    const groups = this.payload.groups.filter((one) => one.run === run);
    const far = (one) => Math.abs(one.step - step);
    const group = (groups.length ? groups : this.payload.groups).reduce(
      (nearest, one) => (nearest && far(nearest) <= far(one) ? nearest : one),
      null,
    );
    this.go({ view: "groups", at: group ? address(group) : null, beside: null, q: "", flags: [], only: null });
  }

  render() {
    const state = readState();
    if (state.view !== this.view) {
      this.view = state.view;
      for (const [name, part] of Object.entries(this.parts)) part.hidden = name !== state.view;
      document.body.dataset.view = state.view;
      if (state.view === "overview") this.charts.draw();
      if (state.view === "evaluation") this.parts.evaluation.replaceChildren(...evaluationTables(this.payload));
      if (state.view === "setup") this.parts.setup.replaceChildren(...setupTables(this.payload));
      window.scrollTo(0, 0);
    }
    for (const tab of document.querySelectorAll("nav a")) {
      tab.href = writeState({ ...state, view: tab.dataset.view });
      tab.toggleAttribute("aria-current", tab.dataset.view === state.view);
      if (tab.dataset.view === state.view) tab.setAttribute("aria-current", "page");
    }
    if (state.view === "groups") this.browser.render(state);
  }

  key(event) {
    const typing = event.target.closest("input, select, textarea, dialog[open]");
    if (event.key === "Escape" && event.target === this.browser.search) this.browser.search.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const press = event.target.closest("button, summary, a, [role=slider]");
    const views = { 1: "overview", 2: "groups", 3: "evaluation", 4: "setup" };
    const { browser } = this,
      groups = this.view === "groups";
    const keys = {
      "?": () => this.help(),
      "/": () => {
        this.go({ view: "groups" });
        browser.search.focus();
        browser.search.select();
      },
      t: () => this.turnTheme(),
      ...Object.fromEntries(Object.entries(views).map(([key, view]) => [key, () => this.go({ view })])),
      ...(groups && {
        j: () => browser.move(1),
        k: () => browser.move(-1),
        ArrowDown: () => browser.move(1),
        ArrowUp: () => browser.move(-1),
        ArrowRight: () => this.step(1),
        ArrowLeft: () => this.step(-1),
        PageDown: () => browser.detail.scrollBy(0, 0.85 * browser.detail.clientHeight),
        PageUp: () => browser.detail.scrollBy(0, -0.85 * browser.detail.clientHeight),
        l: () => this.go({ text: readState().text === "tokens" ? "parts" : "tokens" }, true),
        ...(!press && { " ": () => browser.players[0]?.toggle() }),
      }),
    };
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  }

  /** The next or the previous step that holds a listed group. */
  step(by) {
    const { group, list } = this.browser;
    const steps = [...new Set(list.groups.map((one) => one.step))].sort((a, b) => a - b);
    const next = steps[steps.indexOf(group?.step) + by];
    if (next !== undefined) this.browser.toStep(next);
  }

  turnTheme() {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    if (this.view === "overview") this.charts.draw();
    this.browser.players.forEach((player) => player.drawWave());
  }

  help() {
    document.getElementById("keys").showModal();
  }
}

async function start() {
  const status = document.getElementById("status");
  if (typeof DecompressionStream === "undefined" || !Array.prototype.findLast) {
    status.textContent =
      "This browser is too old for the report: it needs Chrome 111, Firefox 113, Safari 16.4 or a later one.";
    return;
  }
  try {
    const payload = index(await inflate(document.getElementById("payload").textContent));
    document.getElementById("payload").remove();
    new Page(payload);
    status.remove();
  } catch (error) {
    status.textContent = visible(
      `The report's data cannot be read: ${error.message}. The file may be cut; write it again with covo-rl report.`,
    );
    throw error;
  }
}
start();
