// The list of groups: only the rows in sight exist, so that thousands scroll.

const ROW = 60;

class GroupList {
  constructor(runs, onOpen) {
    Object.assign(this, { runs, onOpen, groups: [], current: null, rows: new Map() });
    this.space = el("div", { class: "space" });
    this.node = el(
      "div",
      { class: "list", role: "listbox", tabindex: 0, "aria-label": "groups", on: { scroll: () => this.show() } },
      this.space,
    );
    new ResizeObserver(() => this.show()).observe(this.node);
  }

  set(groups) {
    this.groups = groups;
    this.rows.clear();
    this.space.replaceChildren();
    this.space.style.height = `${groups.length * ROW}px`;
    this.show();
  }

  /** Mark a group as the open one and bring it into sight. */
  mark(group) {
    this.current = group;
    const at = this.groups.indexOf(group),
      { scrollTop, clientHeight } = this.node;
    if (at >= 0 && (at * ROW < scrollTop || (at + 1) * ROW > scrollTop + clientHeight)) {
      this.node.scrollTop = Math.max(at * ROW - clientHeight / 3, 0);
    }
    for (const [i, row] of this.rows) row.setAttribute("aria-selected", this.groups[i] === group);
    this.show();
  }

  show() {
    const first = Math.max(Math.floor(this.node.scrollTop / ROW) - 4, 0);
    const end = Math.min(first + Math.ceil(this.node.clientHeight / ROW) + 8, this.groups.length);
    for (const [i, row] of this.rows)
      if (i < first || i >= end) {
        row.remove();
        this.rows.delete(i);
      }
    for (let i = first; i < end; i++) {
      if (this.rows.has(i)) continue;
      const row = this.row(this.groups[i], i);
      this.rows.set(i, row);
      this.space.append(row);
    }
    const at = this.groups.indexOf(this.current);
    if (this.rows.has(at)) this.node.setAttribute("aria-activedescendant", `group-${this.current.index}`);
    else this.node.removeAttribute("aria-activedescendant");
  }

  row(group, i) {
    const dots = group.rollouts.slice(0, 24).map((rollout) => el("i", { class: verdict(rollout)[0] }));
    return el(
      "div",
      {
        class: "row",
        id: `group-${group.index}`,
        role: "option",
        "aria-selected": group === this.current,
        "aria-setsize": this.groups.length,
        "aria-posinset": i + 1,
        style: { top: `${i * ROW}px` },
        on: { click: () => this.onOpen(group) },
      },
      el(
        "div",
        { class: "row-top" },
        this.runs.length > 1 ? runBadge(group.run) : null,
        el("span", { class: "row-step" }, `${group.step}·${group.group}`),
        said("span", "row-question", group.question),
      ),
      el(
        "div",
        { class: "row-bottom" },
        el("span", { class: "dots", "aria-hidden": "true" }, dots),
        said("span", "row-id", group.id),
        el(
          "span",
          { class: "row-mean", title: "mean R ± standard deviation" },
          "R ",
          el("b", {}, fixed(group.mean)),
          ` ± ${fixed(group.spread)}`,
        ),
      ),
    );
  }
}

const runBadge = (run) => el("span", { class: "run-badge", style: { "--tone": `var(--c${run % 8})` } }, runLetter(run));
