// One image: its caption, tags and suggestion; and both texts where somebody else has changed the caption.

import { Refused, get, known, post, remember } from "./api.js";
import { Tags } from "./tags.js";

const by = (id) => document.getElementById(id);

export class Single {
  constructor({ say, onChange, ids }) {
    Object.assign(this, { say, onChange, ids, place: 0, id: null, base: "", tries: 0, suggestionOf: null });
    this.caption = by("caption");
    this.tags = new Tags({
      chips: by("chips"),
      field: by("new-tag"),
      list: by("tag-list"),
      read: () => this.caption.value,
      write: (text) => this.type(text),
    });
    this.caption.addEventListener("input", () => this.tags.show());
    const clicks = {
      save: () => this.save(),
      "save-accept": () => this.acceptAndGo(),
      accept: () => this.accept(),
      flag: () => this.flag(),
      suggest: () => this.suggest(),
      take: () => this.take(),
      "edit-suggestion": () => this.editSuggestion(),
      reject: () => this.reject(),
      previous: () => this.go(-1),
      next: () => this.go(1),
      "keep-theirs": () => this.settle(),
      "write-mine": () => this.writeMine(),
    };
    for (const [id, act] of Object.entries(clicks)) by(id).addEventListener("click", () => this.guard(act));
  }

  // Errors of the server are said, others are bugs.
  async guard(act) {
    try {
      await act();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this.say(error.message, true);
    }
  }

  get isDirty() {
    return this.id !== null && this.caption.value !== this.shown;
  }

  async open(place) {
    this.place = place;
    this.id = this.ids()[place];
    this.hideConflict();
    this.showSuggestion("");
    const id = this.id;
    const { item } = await get("item", { id });
    remember([item]);
    if (this.id === id) this.show(item);
  }

  show(item) {
    this.base = item.caption;
    this.type(item.caption);
    this.shown = this.caption.value;
    by("name").textContent = item.name;
    const picture = by("picture");
    const source = `/picture/${item.id}?v=${item.version}`;
    if (picture.getAttribute("src") !== source) picture.src = source;
    picture.alt = item.caption || item.name;
    by("place").textContent = `${(this.place + 1).toLocaleString()} of ${this.ids().length.toLocaleString()}`;
    this.mark(item);
  }

  mark(item) {
    const facts = [`${item.words} words`];
    if (item.accepted) facts.push("accepted");
    if (item.flagged) facts.push("flagged");
    if (item.changed) facts.push("changed");
    if (item.copies > 1) facts.push(`in the folder ${item.copies} times`);
    by("facts").textContent = facts.join(" · ");
    by("accept").setAttribute("aria-pressed", String(item.accepted));
    by("flag").setAttribute("aria-pressed", String(item.flagged));
    by("problem").hidden = !item.problem;
    by("problem").textContent = item.problem;
    this.caption.readOnly = Boolean(item.problem);
  }

  type(text) {
    this.caption.value = text;
    this.tags.show();
  }

  async save({ text = this.caption.value, action = "edit", accept = false } = {}) {
    const id = this.id;
    // What a text field makes of line ends is no edit.
    const wanted = text === this.shown ? this.base : text;
    const answer = await post("save", { id, base: this.base, text: wanted, action, accept });
    remember([answer.item]);
    if (this.id !== id) return true;
    if (answer.conflict) {
      this.showConflict(answer.conflict, answer.item);
      return false;
    }
    this.show(answer.item);
    this.hideConflict();
    this.say(accept ? "Saved and accepted" : "Saved");
    this.onChange();
    return true;
  }

  async acceptAndGo() {
    if (await this.save({ accept: true })) await this.go(1);
  }

  async accept() {
    const item = known(this.id);
    if (this.isDirty || !item.accepted) {
      await this.save({ accept: true });
      return;
    }
    const { items } = await post("mark", { ids: [this.id], accepted: false });
    remember(items);
    this.mark(items[0]);
    this.onChange();
  }

  async flag() {
    const { items } = await post("mark", { ids: [this.id], flagged: !known(this.id).flagged });
    remember(items);
    this.mark(items[0]);
    this.onChange();
  }

  // What was typed is saved before another image is shown.
  async leave() {
    return !this.isDirty || this.caption.readOnly || this.save();
  }

  async go(by_) {
    const place = this.place + by_;
    if (!(await this.leave())) return;
    if (place < 0 || place >= this.ids().length) this.say(by_ > 0 ? "This is the last image" : "This is the first image");
    else await this.open(place);
  }

  showConflict({ theirs, yours }, item) {
    this.conflict = { theirs, yours, item };
    by("theirs").textContent = theirs || "no caption";
    by("yours").textContent = yours || "no caption";
    by("conflict").hidden = false;
    this.type(yours);
    by("keep-theirs").focus();
    this.say("Nothing was written: the caption was changed elsewhere", true);
  }

  hideConflict() {
    this.conflict = null;
    by("conflict").hidden = true;
  }

  settle() {
    this.show(this.conflict.item);
    this.hideConflict();
    this.caption.focus();
  }

  async writeMine() {
    this.base = this.conflict.theirs;
    this.shown = null; // whatever stands in the field is an edit of it
    // The button that was pressed goes away, and the focus with it.
    if (await this.save({ action: "conflict" })) this.caption.focus();
  }

  async suggest() {
    const id = this.id;
    const temperature = Number(by("temperature").value) || 0;
    const beams = by("beams").value ? Number(by("beams").value) : null;
    const values = { id, prompt: by("prompt").value, temperature, try_number: this.tries++ };
    if (beams !== null) values.beams = beams;
    by("suggest").disabled = true;
    by("suggestion").textContent = "asking the model…";
    this.say(""); // what was wrong with the one before
    try {
      const { text } = await post("suggest", values);
      if (this.id === id) this.showSuggestion(text);
    } catch (error) {
      if (this.id === id) this.showSuggestion("");
      throw error;
    } finally {
      by("suggest").disabled = false;
    }
  }

  showSuggestion(text) {
    this.suggestion = text;
    by("suggestion").textContent = text;
    for (const id of ["take", "edit-suggestion", "reject"]) by(id).disabled = !text;
  }

  async take() {
    if (!this.suggestion) return;
    const text = this.suggestion;
    if (await this.save({ text, action: "suggestion", accept: true })) this.showSuggestion("");
  }

  editSuggestion() {
    if (!this.suggestion) return;
    this.type(this.suggestion);
    this.caption.focus();
  }

  reject() {
    this.showSuggestion("");
    this.say("Suggestion rejected");
  }
}
