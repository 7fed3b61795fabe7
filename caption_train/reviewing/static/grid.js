// All images as a grid of which only the visible rows are in the document, however many there are.

import { known, onItems, want } from "./api.js";

const CELL_WIDTH = 172;
const ROW_HEIGHT = 228;
const ROWS_AHEAD = 2;
const PAUSE = 60; // milliseconds without scrolling before pictures are asked for

export class Grid {
  constructor(element, space, { onOpen, onSelect }) {
    this.element = element;
    this.space = space;
    this.onOpen = onOpen;
    this.onSelect = onSelect;
    this.ids = [];
    this.cells = new Map();
    this.selected = new Set();
    this.current = 0;
    this.anchor = 0;
    this.frame = 0;
    element.addEventListener("scroll", () => this.draw(), { passive: true });
    new ResizeObserver(() => this.draw()).observe(element);
    onItems((news) => news.forEach((item) => this.update(item)));
  }

  show(ids) {
    const id = this.ids[this.current];
    this.ids = ids;
    this.current = Math.max(0, ids.indexOf(id));
    const there = new Set(ids);
    for (const one of this.selected) if (!there.has(one)) this.selected.delete(one);
    this.clear();
    this.draw();
    this.onSelect();
  }

  clear() {
    for (const cell of this.cells.values()) cell.remove();
    this.cells.clear();
  }

  draw() {
    if (!this.frame) this.frame = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    this.frame = 0;
    const width = this.element.clientWidth;
    if (!width) return;
    const columns = Math.max(2, Math.floor(width / CELL_WIDTH));
    if (columns !== this.columns || width !== this.width) this.clear();
    Object.assign(this, { columns, width });
    this.space.style.height = `${Math.ceil(this.ids.length / columns) * ROW_HEIGHT}px`;
    const top = Math.floor(this.element.scrollTop / ROW_HEIGHT) - ROWS_AHEAD;
    const rows = Math.ceil(this.element.clientHeight / ROW_HEIGHT) + 2 * ROWS_AHEAD;
    const first = Math.max(0, top * columns);
    const last = Math.min(this.ids.length, (top + rows) * columns);
    for (const [place, cell] of this.cells) {
      if (place < first || place >= last) {
        cell.querySelector("img")?.removeAttribute("src"); // so that the browser gives up the request
        cell.remove();
        this.cells.delete(place);
      }
    }
    for (let place = first; place < last; place++) if (!this.cells.has(place)) this.add(place);
    want(this.ids.slice(first, last));
    this.mark();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.loadPictures(), PAUSE);
  }

  add(place) {
    const cell = document.createElement("div");
    const width = Math.floor(this.width / this.columns);
    cell.className = "cell";
    cell.id = `cell-${place}`;
    cell.setAttribute("role", "option");
    cell.setAttribute("aria-posinset", place + 1);
    cell.setAttribute("aria-setsize", this.ids.length);
    cell.style.width = `${width}px`;
    cell.style.height = `${ROW_HEIGHT}px`;
    cell.style.left = `${(place % this.columns) * width}px`;
    cell.style.top = `${Math.floor(place / this.columns) * ROW_HEIGHT}px`;
    const frame = document.createElement("div");
    frame.className = "frame";
    const words = document.createElement("div");
    words.className = "words";
    const badges = document.createElement("div");
    badges.className = "badges";
    cell.append(frame, words, badges);
    cell.addEventListener("click", (event) => this.click(place, event));
    cell.addEventListener("dblclick", () => this.onOpen(place));
    // In the order of the images, for those who listen to the page.
    const after = [...this.cells.keys()].filter((other) => other > place);
    this.space.insertBefore(cell, after.length ? this.cells.get(Math.min(...after)) : null);
    this.cells.set(place, cell);
    const item = known(this.ids[place]);
    if (item) this.fill(cell, item);
  }

  fill(cell, item) {
    const words = cell.querySelector(".words");
    words.textContent = item.problem ? item.problem : item.caption || "no caption";
    words.classList.toggle("none", !item.caption);
    const badges = [
      ["accepted", item.accepted, "accepted"],
      ["flagged", item.flagged, "flagged"],
      ["changed", item.changed, "changed"],
      ["copies", item.copies > 1, `×${item.copies}`],
      ["problem", item.problem, "locked"],
    ].filter(([, shown]) => shown);
    cell.querySelector(".badges").replaceChildren(
      ...badges.map(([name, , text]) => {
        const badge = document.createElement("span");
        badge.className = name;
        badge.textContent = text;
        return badge;
      }),
    );
    cell.setAttribute("aria-label", [item.name, item.caption || "no caption", ...badges.map((b) => b[2])].join(", "));
  }

  update(item) {
    for (const [place, cell] of this.cells) if (this.ids[place] === item.id) this.fill(cell, item);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.loadPictures(), PAUSE);
  }

  loadPictures() {
    for (const [place, cell] of this.cells) {
      const item = known(this.ids[place]);
      if (!item || cell.querySelector("img")) continue;
      const image = document.createElement("img");
      image.alt = "";
      image.decoding = "async";
      image.addEventListener("error", () => {
        if (image.hasAttribute("src")) image.replaceWith("no picture");
      });
      image.src = `/thumbnail/${item.id}?v=${item.version}`;
      cell.querySelector(".frame").replaceChildren(image);
    }
  }

  mark() {
    for (const [place, cell] of this.cells) {
      cell.classList.toggle("current", place === this.current);
      cell.setAttribute("aria-selected", this.selected.has(this.ids[place]));
    }
    if (this.cells.has(this.current)) {
      this.element.setAttribute("aria-activedescendant", `cell-${this.current}`);
    } else {
      this.element.removeAttribute("aria-activedescendant");
    }
  }

  click(place, event) {
    if (event.shiftKey) this.selectTo(place);
    else if (event.ctrlKey || event.metaKey) this.toggle(place);
    else if (matchMedia("(pointer: coarse)").matches) return this.onOpen(place);
    this.current = place;
    if (!event.shiftKey) this.anchor = place;
    this.mark();
  }

  toggle(place = this.current) {
    const id = this.ids[place];
    if (!this.selected.delete(id)) this.selected.add(id);
    this.anchor = place;
    this.mark();
    this.onSelect();
  }

  selectTo(place) {
    const [from, to] = [Math.min(this.anchor, place), Math.max(this.anchor, place)];
    this.selected = new Set(this.ids.slice(from, to + 1));
    this.mark();
    this.onSelect();
  }

  select(ids) {
    this.selected = new Set(ids);
    this.mark();
    this.onSelect();
  }

  move(by, extend = false) {
    const place = Math.min(this.ids.length - 1, Math.max(0, this.current + by));
    if (extend) this.selectTo(place);
    else this.anchor = place;
    this.current = place;
    this.reveal();
  }

  reveal() {
    const top = Math.floor(this.current / (this.columns || 1)) * ROW_HEIGHT;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop) this.element.scrollTop = top;
    else if (top + ROW_HEIGHT > scrollTop + clientHeight) this.element.scrollTop = top + ROW_HEIGHT - clientHeight;
    this.drawNow();
  }

  rowsOnPage() {
    return Math.max(1, Math.floor(this.element.clientHeight / ROW_HEIGHT));
  }
}
