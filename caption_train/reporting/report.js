// The gallery of captions beside their images, with filters, from the JSON in #data.
(() => {
  const { byId, data, make, showNearby, forgetPictures, listen } = page;
  const BATCH = 40, MOST_WORDS = 400;
  const LABELS = { cut: "cut off", empty: "empty", repeats: "looping" };

  const gallery = byId("gallery");
  if (!gallery) {
    listen({});
    return;
  }

  // Words that one text has and another lacks, by their longest common subsequence -----------------------
  const split = (text) => text.split(/(\s+)/).filter((part) => part);
  const plain = (word) => word.toLowerCase().replace(/^[^\p{L}\p{N}]+|[^\p{L}\p{N}]+$/gu, "") || word;
  const findCommon = (one, other) => {
    const width = other.length + 1, table = new Uint16Array((one.length + 1) * width);
    for (let i = one.length - 1; i >= 0; i--) {
      for (let j = other.length - 1; j >= 0; j--) {
        table[i * width + j] = one[i] === other[j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
      }
    }
    const common = new Set();
    for (let i = 0, j = 0; i < one.length && j < other.length;) {
      if (one[i] === other[j]) { common.add(i); i++; j++; }
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
      else j++;
    }
    return common;
  };
  const fill = (element, text, against, kind) => {
    const parts = split(text);
    const words = parts.filter((part) => part.trim()), others = against === null ? [] : split(against).filter((p) => p.trim());
    if (against === null || words.length > MOST_WORDS || others.length > MOST_WORDS) {
      element.textContent = text;
      return;
    }
    const common = findCommon(words.map(plain), others.map(plain));
    let number = 0;
    for (const part of parts) {
      if (!part.trim()) element.append(part);
      else if (common.has(number++)) element.append(part);
      else element.append(make("mark", part, kind));
    }
  };

  // Controls ---------------------------------------------------------------------------------------------
  const columns = data.columns, items = data.items, metrics = data.metrics;
  const hasReferences = items.some((item) => item.references.length);
  const has = (remark) => items.some((item) => item.answers.some((a) => a && a[1].includes(remark)));
  const options = (id, pairs, chosen) => {
    for (const [value, label] of pairs) {
      const option = make("option", label);
      option.value = value;
      byId(id).append(option);
    }
    if (chosen !== undefined) byId(id).value = chosen;
  };
  const several = columns.length > 1, last = columns.length - 1;
  options("show", [
    ["all", "all images"],
    ...(several ? [["changed", `changed from ${columns[0]}`], ["same", `same as ${columns[0]}`]] : []),
    ...(hasReferences ? [["wrong", "not as the reference"], ["right", "as the reference"]] : []),
    ...(metrics.length ? [["worst", "worst tenth"], ["best", "best tenth"]] : []),
    ...data.remarks.filter((r) => has(r) || r !== "cut").map((r) => [r, LABELS[r] || r]),
  ]);
  options("sort", [
    ["given", "as in the dataset"],
    ...(metrics.length ? [["worst", "worst first"], ["best", "best first"]] : []),
    ...(metrics.length && several ? [["gain", "most improved"], ["loss", "most worsened"]] : []),
    ["long", "longest first"], ["short", "shortest first"], ["name", "file name"],
  ]);
  options("model", columns.map((name, index) => [String(index), name]), String(last));
  options("metric", metrics.map(([key, label]) => [key, label]));
  options("against", [
    ...(hasReferences ? [["reference", "the reference"]] : []),
    ...(several ? [["first", columns[0]]] : []),
    ["", "nothing"],
  ]);
  byId("metric-label").hidden = !metrics.length;
  const shown = new Set();
  columns.forEach((name, index) => {
    const label = make("label"), box = make("input");
    box.type = "checkbox";
    box.checked = columns.length <= 6 || index === 0 || index === last;
    if (box.checked) shown.add(index);
    box.addEventListener("change", () => {
      if (box.checked) shown.add(index); else shown.delete(index);
      refresh();
    });
    label.append(box, name);
    byId("columns").append(label);
  });
  byId("columns").hidden = !columns.length;
  byId("controls").hidden = false;

  const value = (id) => byId(id).value;
  const score = (item, column) => {
    const answer = item.answers[column], found = answer && answer[2][value("metric")];
    return typeof found === "number" ? found : null;
  };
  const even = (text) => text.split(/\s+/).filter(Boolean).join(" ");
  const isRight = (item, column) =>
    item.answers[column] && item.references.some((r) => even(r) === even(item.answers[column][0]));
  const isChanged = (item, column) =>
    item.answers[column] && item.answers[0] && item.answers[column][0] !== item.answers[0][0];

  const choose = () => {
    const column = Number(value("model")), show = value("show"), sort = value("sort");
    const wanted = value("search").toLowerCase().split(/\s+/).filter(Boolean);
    const sign = (metrics.find(([key]) => key === value("metric")) || [0, 0, 1])[2] < 0 ? -1 : 1;
    const rank = (item) => { const found = score(item, column); return found === null ? null : sign * found; };
    const gain = (item) => {
      const [now, then] = [score(item, column), score(item, 0)];
      return now === null || then === null ? null : sign * (now - then);
    };
    let found = items.filter((item) => {
      const text = [item.name, ...item.references, ...item.answers.map((a) => a ? a[0] : "")].join("\n").toLowerCase();
      return wanted.every((word) => text.includes(word));
    });
    const by = (measure, order) => (one, other) => {
      const [a, b] = [measure(one), measure(other)];
      return a === null ? (b === null ? 0 : 1) : b === null ? -1 : order * (a - b);
    };
    if (show === "changed") found = found.filter((item) => isChanged(item, column));
    else if (show === "same") found = found.filter((item) => item.answers[column] && !isChanged(item, column));
    else if (show === "right") found = found.filter((item) => isRight(item, column));
    else if (show === "wrong") found = found.filter((item) => item.answers[column] && !isRight(item, column));
    else if (show === "worst" || show === "best") {
      const scored = found.filter((item) => rank(item) !== null).sort(by(rank, show === "worst" ? 1 : -1));
      const kept = new Set(scored.slice(0, Math.ceil(scored.length / 10)));
      found = sort === "given" ? [...kept] : found.filter((item) => kept.has(item));
    } else if (show !== "all") found = found.filter((item) => item.answers[column] && item.answers[column][1].includes(show));
    const length = (item) => item.answers[column] ? item.answers[column][0].length : null;
    if (sort === "worst") found.sort(by(rank, 1));
    else if (sort === "best") found.sort(by(rank, -1));
    else if (sort === "gain") found.sort(by(gain, -1));
    else if (sort === "loss") found.sort(by(gain, 1));
    else if (sort === "long") found.sort(by(length, -1));
    else if (sort === "short") found.sort(by(length, 1));
    else if (sort === "name") found.sort((a, b) => a.name.localeCompare(b.name, undefined, { numeric: true }));
    return found;
  };

  // Cards, a batch at a time; a picture is decoded when it comes near the screen ---------------------------
  let found = [], done = 0;
  const describe = (item, column) => {
    const name = column < 0 ? "reference" : columns[column];
    const term = make("dt", name), group = make("div");
    const answer = column < 0 ? null : item.answers[column];
    for (const remark of answer ? answer[1] : []) term.append(" ", make("span", LABELS[remark] || remark, "badge"));
    const metric = metrics.find(([key]) => key === value("metric"));
    if (metric && column >= 0 && score(item, column) !== null) {
      term.append(" · ", make("span", `${metric[1]} ${score(item, column).toFixed(3)}`, "score"));
    }
    group.append(term);
    return group;
  };
  const describeReferences = (item) => {
    const group = describe(item, -1), chosen = item.answers[Number(value("model"))];
    for (const reference of item.references) {
      const text = make("dd");
      fill(text, reference, value("against") === "reference" && chosen ? chosen[0] : null, "lacking");
      group.append(text);
    }
    return group;
  };
  const nearest = (item, caption) => {
    // Of several references, the one that shares most words with the caption.
    const words = new Set(split(caption).map(plain));
    const shared = (text) => split(text).filter((word) => words.has(plain(word))).length / (split(text).length + 1);
    return item.references.reduce((best, text) => best === null || shared(text) > shared(best) ? text : best, null);
  };
  const describeAnswer = (item, column) => {
    const group = describe(item, column), answer = item.answers[column];
    const text = make("dd");
    if (!answer) text.append(make("span", "none", "none"));
    else if (!answer[0]) text.append(make("span", "empty", "none"));
    else {
      const against = value("against"), first = item.answers[0];
      let other = null, kind;
      if (against === "reference" && item.references.length) other = nearest(item, answer[0]);
      else if (against === "first" && column > 0 && first) other = first[0];
      else if (against === "first" && column === 0 && Number(value("model")) > 0) {
        const chosen = item.answers[Number(value("model"))];
        [other, kind] = [chosen ? chosen[0] : null, "lacking"];
      }
      fill(text, answer[0], other, kind);
    }
    group.append(text);
    return group;
  };
  const makeCard = (item) => {
    const card = make("li"), picture = make("div", undefined, "picture"), captions = make("dl", undefined, "captions");
    card.tabIndex = -1;
    if (item.picture) {
      const image = make("img");
      image.alt = item.references.length ? `image with the reference: ${item.references[0]}` : "image";
      [, image.width, image.height] = item.picture;
      showNearby(image, item.picture[0]);
      picture.append(image);
    }
    picture.append(make("h3", item.name));
    if (item.prompt) picture.append(make("p", `prompt: ${item.prompt}`));
    if (item.references.length) captions.append(describeReferences(item));
    for (const column of [...shown].sort((a, b) => a - b)) captions.append(describeAnswer(item, column));
    card.append(picture, captions);
    return card;
  };
  const showMore = () => {
    const part = document.createDocumentFragment();
    for (const item of found.slice(done, done + BATCH)) part.append(makeCard(item));
    gallery.append(part);
    done = Math.min(done + BATCH, found.length);
    byId("more").hidden = done >= found.length;
  };
  const refresh = () => {
    forgetPictures();
    gallery.replaceChildren();
    [found, done] = [choose(), 0];
    byId("count").textContent = found.length === items.length
      ? (items.length === 1 ? "1 image" : `${items.length} images`) : `${found.length} of ${items.length} images`;
    showMore();
  };
  byId("more").addEventListener("click", showMore);
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && done < found.length) showMore();
  }, { rootMargin: "1200px" }).observe(byId("more"));

  let waiting;
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("input", (event) => {
    if (event.target.type === "checkbox") return;
    clearTimeout(waiting);
    waiting = setTimeout(refresh, event.target.type === "search" ? 150 : 0);
  });

  // Keys -------------------------------------------------------------------------------------------------
  const move = (by) => {
    const current = document.activeElement.closest("#gallery > li");
    if (by > 0 && current && !current.nextElementSibling && done < found.length) showMore();
    const next = current ? (by > 0 ? current.nextElementSibling : current.previousElementSibling) : gallery.firstElementChild;
    if (!next) return;
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "start" });
  };
  listen({ j: () => move(1), k: () => move(-1), "/": () => byId("search").focus() });
  refresh();
})();
