// The group browser: search, filters, steps and the list on one side, the open group on the other.

/** What a key of this element is found by after its part of the page was drawn anew. */
const focusName = (node) => node.dataset.flag ?? (node.id || node.getAttribute("aria-label") || node.textContent);

/** Draw a part anew without taking the focus from its reader: to the same control, else to the part's first place. */
function keepFocus(part, draw) {
  const focus = part.contains(document.activeElement) && focusName(document.activeElement);
  draw();
  if (focus === false) return;
  const places = [...part.querySelectorAll("button:enabled, select, input, [tabindex]")];
  (places.find((node) => focusName(node) === focus) ?? part.querySelector("h2") ?? places[0])?.focus({
    preventScroll: true,
  });
}

class Browser {
  constructor(root, payload, go) {
    Object.assign(this, { root, payload, go, players: [], shown: null, group: null, timer: null });
    this.search = el("input", {
      type: "search",
      id: "search",
      placeholder: "search question, completion, id  ( / )",
      "aria-label": "search question, completion, id",
      on: { input: () => this.typed() },
    });
    this.filters = el("div", { class: "filters", role: "group", "aria-label": "filters" });
    this.sort = el(
      "select",
      { id: "sort", "aria-label": "order", on: { change: () => go({ sort: this.sort.value }) } },
      Object.entries(SORTS).map(([name, [label]]) => el("option", { value: name }, label)),
    );
    this.count = el("span", { class: "count", role: "status" });
    this.list = new GroupList(payload.runs, (group) => this.open(group));
    this.detail = el("div", { class: "detail" });
    const steps = payload.steps;
    this.slider = el("input", {
      type: "range",
      id: "step",
      min: 0,
      max: Math.max(steps.length - 1, 0),
      "aria-label": "step",
      on: { input: () => this.toStep(steps[this.slider.value]) },
    });
    this.stepName = el("output", { for: "step" });
    root.append(
      el(
        "aside",
        { class: "side" },
        this.search,
        this.filters,
        el("label", { class: "steps" }, this.stepName, this.slider),
        el("div", { class: "list-bar" }, this.count, this.sort),
        this.list.node,
      ),
      this.detail,
    );
    (window.requestIdleCallback || setTimeout)(() => this.warm(0));
  }

  /** Make the search's texts while nothing else happens, some at a time. */
  warm(from) {
    const end = Math.min(from + 200, this.payload.groups.length);
    for (let i = from; i < end; i++) haystack(this.payload.groups[i]);
    if (end < this.payload.groups.length) (window.requestIdleCallback || setTimeout)(() => this.warm(end));
  }

  typed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.go({ q: this.search.value }, true), 80);
  }

  render(state) {
    this.state = state;
    const wanted = JSON.stringify([state.q, state.flags, state.only, state.sort]);
    if (wanted !== this.shown) {
      this.shown = wanted;
      const { groups, counts } = select(this.payload, {
        query: state.q,
        flags: state.flags,
        run: state.only,
        sort: state.sort,
      });
      this.list.set(groups);
      this.showFilters(counts);
      this.count.textContent =
        groups.length === this.payload.groups.length
          ? plural(groups.length, "group")
          : `${groups.length.toLocaleString("en")} of ${plural(this.payload.groups.length, "group")}`;
    }
    if (document.activeElement !== this.search) this.search.value = state.q;
    this.sort.value = state.sort in SORTS ? state.sort : "step";
    const group = this.find(state.at) ?? this.list.groups[0] ?? null;
    this.showGroup(group);
    this.highlight(state.q);
  }

  showFilters(counts) {
    const { flags, only } = this.state;
    const chips = this.payload.flags.map((flag) =>
      button(
        FLAGS[flag][0],
        () => this.go({ flags: flags.includes(flag) ? flags.filter((other) => other !== flag) : [...flags, flag] }),
        {
          class: "filter",
          title: FLAGS[flag][1],
          "aria-pressed": flags.includes(flag),
          "data-flag": flag,
          disabled: !counts[flag] && !flags.includes(flag),
        },
      ),
    );
    chips.forEach((chip, i) => chip.append(el("b", {}, counts[this.payload.flags[i]].toLocaleString("en"))));
    const runs =
      this.payload.runs.length < 2
        ? []
        : this.payload.runs.map((run, r) => {
            const chip = button("", () => this.go({ only: only === r ? null : r }), {
              class: "filter",
              "aria-pressed": only === r,
              "data-flag": `run-${r}`,
              "aria-label": `only run ${runLetter(r)}`,
            });
            chip.append(runBadge(r), said("span", "", run.name));
            return chip;
          });
    const clear =
      flags.length || only !== null || this.state.q
        ? [button("clear", () => this.go({ flags: [], only: null, q: "" }), { class: "clear" })]
        : [];
    keepFocus(this.filters, () => this.filters.replaceChildren(...runs, ...chips, ...clear));
  }

  showGroup(group) {
    const { text, flags } = this.state;
    const beside = this.find(this.state.beside);
    const key = JSON.stringify([group?.index, text, flags, beside?.index]);
    if (key !== this.key) {
      const other = group !== this.group;
      Object.assign(this, { key, group });
      this.players.forEach((player) => player.audio?.pause());
      if (group) {
        const view = groupView(
          this.payload,
          group,
          { beside: beside?.prompt === group.prompt ? beside : null, text, marked: bits(flags) },
          {
            onOpen: (opened) => this.open(opened),
            onBeside: (shown) => this.go({ beside: shown && address(shown) }),
            onText: (mode) => this.go({ text: mode }, true),
            onNext: () => this.move(1),
            onPrevious: () => this.move(-1),
          },
        );
        this.players = view.players;
        keepFocus(this.detail, () => this.detail.replaceChildren(view.node));
        if (other) this.detail.scrollTop = 0;
      } else {
        this.players = [];
        const why = this.payload.groups.length
          ? "No group matches: clear a filter or the search."
          : "The run has logged no rollouts.";
        this.detail.replaceChildren(el("p", { class: "quiet empty" }, why));
      }
    }
    this.list.mark(group);
    if (group) this.slider.value = this.payload.steps.indexOf(group.step);
    this.stepName.textContent = group ? `step ${group.step} of ${this.payload.steps.at(-1)}` : "no step";
    this.slider.setAttribute("aria-valuetext", this.stepName.textContent);
  }

  find(at) {
    return at ? this.payload.groups.find((group) => address(group) === at) : undefined;
  }

  open(group) {
    this.go({ at: address(group), beside: null });
  }

  move(by) {
    const { groups } = this.list;
    const at = groups.indexOf(this.group);
    const next = groups[Math.min(Math.max(at + by, 0), groups.length - 1)];
    if (next && next !== this.group) this.go({ at: address(next), beside: null }, true);
  }

  /** The first listed group of a step, of the open group's run if it has one there. */
  toStep(step) {
    const there = this.list.groups.filter((group) => group.step === step);
    const next = there.find((group) => group.run === this.group?.run) ?? there[0];
    if (next) this.go({ at: address(next), beside: null }, true);
    else this.stepName.textContent = `step ${step}: no match`;
  }

  /** Tint the query where it stands in the open group, without touching its text. */
  highlight(query) {
    if (!window.Highlight) return;
    const needle = query.trim().toLowerCase(),
      ranges = [];
    const walker = needle ? document.createTreeWalker(this.detail, NodeFilter.SHOW_TEXT) : null;
    while (walker?.nextNode()) {
      const node = walker.currentNode,
        text = node.data.toLowerCase();
      if (text.length !== node.data.length) continue;
      for (let at = text.indexOf(needle); at >= 0; at = text.indexOf(needle, at + needle.length)) {
        const range = new Range();
        range.setStart(node, at);
        range.setEnd(node, at + needle.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("query", new Highlight(...ranges));
  }
}

/** run.step.group: what a link names a group by */
const address = (group) => `${group.run}.${group.step}.${group.group}`;
