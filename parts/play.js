// The page of `sample.py --play`. A wish is sent as JSON, and its answer is heard line by line
// (play.py): steps of the sampler, drawn pictures, judged rounds. A round is as in run.json, with
// its target and with pictures as data: URLs.

const start = JSON.parse(document.body.dataset.start);
const tab = Math.random().toString(36).slice(2); // by which the server knows this tab
const find = id => document.getElementById(id);
const fields = find("form").elements;
const plane = find("plane");
const hasJudge = !find("improve").hidden;

let wish = null; // the last one that the server has taken
let rounds = []; // what has come of it: one round for each target, or those of feedback
let shown = null; // [round, image] of the large picture
let request = null; // AbortController of the wish that is under way, or was
let arrow = null; // [from, to] while one is dragged

// ------------------------------------------------------------------------------------------------
// Asking

async function ask(next, kept = [], again = false) {
  request?.abort();
  const mine = request = new AbortController();
  let ended = false;
  if (!again) {
    tell("Waiting for the model");
    find("picture").classList.add("old");
    find("said").inert = true;
  }
  try {
    const answer = await fetch("/draw", {
      method: "POST", body: JSON.stringify({ tab, ...next }), signal: mine.signal,
    });
    if (!answer.ok) {
      hear(await answer.json());
      return;
    }
    wish = next;
    rounds = [...kept];
    drawSections();
    for await (const line of linesOf(answer)) {
      hear(line);
      ended ||= line.done || line.error;
    }
  } catch (error) {
    console.error(error); // aborted, if this tab has asked anew; else the server is lost
  }
  if (mine === request && !ended) {
    tell(`The server does not answer. Start \`${start.command}\` again; this page then goes on.`,
      true);
    setTimeout(() => mine === request && ask(next, kept, true), 1000);
  }
}

async function* linesOf(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

function hear(line) {
  if (line.prompt) tell("Drawing");
  if (line.step) tell("Drawing", false, line.step / line.steps);
  if (line.drawn) {
    if (hasJudge) tell("Judging");
    find("shown").hidden = false;
    find("picture").src = line.drawn[0];
    find("picture").classList.remove("old");
  }
  if (line.round) {
    const round = { ...line.round, request: wish.prompt };
    rounds.push(round);
    show(...(wish.improve === null ? [round, round.images[0]] : bestOf(rounds)));
  }
  if (line.done) tell("");
  if (line.error) {
    tell(line.error, true);
    if (shown) show(...shown);
  }
}

function tell(text, isError = false, share = null) {
  find("status").textContent = text;
  find("status").classList.toggle("alert", isError);
  find("progress").classList.toggle("on", share !== null);
  find("progress").value = share ?? 0;
}

// ------------------------------------------------------------------------------------------------
// Wishes

function point() {
  return [fields.v.valueAsNumber, fields.a.valueAsNumber];
}

function onScale(x) {
  return Math.round(10 * Math.min(9, Math.max(1, x))) / 10;
}

function moveTo([v, a]) {
  fields.v.value = onScale(v);
  fields.a.value = onScale(a);
  drawMarks();
}

function drawHere() {
  drawTargets([point()]);
}

function drawPoint(event) {
  if (event.shiftKey && wish) drawAlong(wish.targets.at(-1), point());
  else drawHere();
}

function drawAlong(from, to) {
  const between = (i, share) => Math.round(100 * (from[i] + (to[i] - from[i]) * share)) / 100;
  drawTargets([0, 0.25, 0.5, 0.75, 1].map(share => [between(0, share), between(1, share)]));
}

function drawTargets(targets) {
  ask({ prompt: fields.prompt.value, seed: fields.seed.valueAsNumber, targets, improve: null });
}

// One round more: from the picture that is shown or, if there was feedback, from its last round,
// which the answer begins with once more.
function improve() {
  const goesOn = wish.improve !== null && rounds.length > 0;
  const from = goesOn ? rounds.at(-1) : shown[0];
  const kept = goesOn ? rounds.slice(0, -1) : [];
  ask({
    prompt: from.request, seed: from.images[0].seed, targets: [[from.v, from.a]],
    improve: from.prompt,
  }, kept);
}

// [round, image]: the picture of least loss, among equals the latest round's.
function bestOf(rounds) {
  let best = null;
  for (const round of rounds) {
    const image = round.images[round.best ?? 0];
    if (!best || (image.loss ?? 16) <= (best[1].loss ?? 16)) best = [round, image];
  }
  return best;
}

// ------------------------------------------------------------------------------------------------
// Pictures

function show(round, image) {
  shown = [round, image];
  find("shown").hidden = false;
  find("said").inert = false;
  find("picture").classList.remove("old");
  find("picture").src = image.file;
  find("picture").alt = `${round.prompt}: ${numbers(image)}`;
  find("emotion").textContent = image.emotion ?? "The picture";
  find("wanted_v").textContent = round.v.toFixed(2);
  find("wanted_a").textContent = round.a.toFixed(2);
  find("judged_v").textContent = image.v?.toFixed(2) ?? "not readable";
  find("judged_a").textContent = image.a?.toFixed(2) ?? "not readable";
  find("reasoning").textContent = image.reasoning;
  find("prompt").textContent = round.prompt;
  save(find("save"), round, image);
  drawSections();
}

function save(link, round, image) {
  link.href = image.file;
  link.download = `v${round.v}_a${round.a}_seed${image.seed}.png`;
}

function numbers(image) {
  if (image.v === null) return hasJudge ? "not readable" : `seed ${image.seed}`;
  return `V ${image.v.toFixed(2)} A ${image.a.toFixed(2)}`;
}

function drawSections() {
  const isStrip = wish.targets.length > 1;
  const isFeedback = wish.improve !== null;
  find("strip").hidden = !isStrip;
  find("strip").lastElementChild.replaceChildren(
    ...(isStrip ? rounds.map((round, i) => card(round, round.images[0], i)) : []));
  find("feedback").hidden = !isFeedback;
  find("feedback").lastElementChild.replaceChildren(...(isFeedback ? rounds.map(section) : []));
  find("improve").textContent = isFeedback ? "One more round" : "A round of feedback";
  drawMarks();
}

function section(round, r) {
  const made = clone("round");
  const best = round.images[round.best]?.loss;
  made.querySelector("h3").textContent =
    `Round ${r}` + (best == null ? "" : ` · best loss ${best.toFixed(2)}`);
  made.querySelector(".prompt").innerHTML = round.changes; // escaped by the server (page.changes)
  made.querySelector(".cards").append(...round.images.map(image => card(round, image, r)));
  made.querySelector(".analysis").textContent = round.analysis ?? "";
  made.querySelector(".note").textContent = round.note;
  return made;
}

function card(round, image, index) {
  const made = clone("card");
  const mark = { [round.worst]: "worst", [round.best]: "best" }[round.images.indexOf(image)];
  if (mark && round.images.length > 1) {
    made.classList.add(mark);
    made.querySelector("strong").textContent = mark;
  }
  made.classList.toggle("shown", image === shown?.[1]);
  made.querySelector("button").onclick = () => show(round, image);
  made.querySelector("img").src = image.file;
  made.querySelector("img").alt = `${round.prompt}: ${numbers(image)}`;
  made.querySelector(".key").style.background = colour(index);
  made.querySelector(".key").textContent = nameOf(index);
  made.querySelector(".numbers").textContent = numbers(image);
  made.querySelector("details").hidden = !image.reasoning;
  made.querySelector("details p").textContent = image.reasoning;
  save(made.querySelector("a"), round, image);
  return made;
}

function clone(id) {
  return find(id).content.firstElementChild.cloneNode(true);
}

// ------------------------------------------------------------------------------------------------
// The plane; its unit is 1/40 of a point of the scale, as in page.py

function at([v, a]) {
  return [4 + 40 * v, 376 - 40 * a];
}

// Targets count from 1, rounds from 0; a single target needs no number.
function nameOf(r) {
  if (wish.improve !== null) return r;
  return wish.targets.length > 1 ? r + 1 : "";
}

function colour(r) {
  const count = wish.improve === null ? wish.targets.length : Math.max(2, rounds.length);
  return `oklch(0.6 0.16 ${(265 + 150 * r / Math.max(1, count - 1)) % 360})`;
}

function drawMarks() {
  const marks = [];
  const heads = []; // over the others
  const [v, a] = point();
  const isFeedback = wish?.improve != null;
  if (isFeedback) {
    const best = rounds.map(round => bestOf([round])[1]).filter(image => image.v !== null);
    const points = best.map(image => at([image.v, image.a]).join(",")).join(" ");
    marks.push(`<polyline class="way" points="${points}"/>`);
  } else if (wish?.targets.length > 1) {
    marks.push(arrowFrom(wish.targets[0], wish.targets.at(-1)));
  }
  rounds.forEach((round, r) => {
    for (const image of round.images.filter(image => image.v !== null)) {
      const [x, y] = at([image.v, image.a]);
      const isHead = image === bestOf([round])[1];
      if (!isFeedback) {
        const [fromX, fromY] = at([round.v, round.a]);
        marks.push(`<path class="way" d="M${fromX} ${fromY}L${x} ${y}"/>`);
        if (round.v !== v || round.a !== a) {
          marks.push(`<circle class="line" cx="${fromX}" cy="${fromY}" r="4"/>`);
        }
      }
      const name = isHead ? nameOf(r) : "";
      (isHead ? heads : marks).push(
        `<circle cx="${x}" cy="${y}" r="${isHead ? 9 : 4.5}" fill="${colour(r)}"/>`
        + `<text class="on" x="${x}" y="${y + 4}">${name}</text>`);
    }
  });
  if (arrow) marks.push(arrowFrom(...arrow));
  const [x, y] = at([v, a]);
  if (x && y) { // else a field is empty
    heads.push(`<g class="line" transform="translate(${x} ${y})"><circle r="8"/>`
      + `<path d="M-14 0H14M0-14V14"/></g>`);
  }
  find("marks").innerHTML = [...marks, ...heads].join(""); // nothing but numbers
}

function arrowFrom(from, to) {
  const [x, y] = at(from);
  const [toX, toY] = at(to);
  const turn = Math.atan2(toY - y, toX - x) * 180 / Math.PI;
  return `<path class="arrow" d="M${x} ${y}L${toX} ${toY}"/>`
    + `<path class="head" d="M0 0L-11 5V-5Z" transform="translate(${toX} ${toY}) rotate(${turn})"/>`;
}

function place(event) {
  const { x, y } = new DOMPoint(event.clientX, event.clientY)
    .matrixTransform(plane.getScreenCTM().inverse());
  return [onScale((x - 4) / 40), onScale((376 - y) / 40)];
}

// ------------------------------------------------------------------------------------------------
// Pointer and keys

let pressed = null; // the event that began a click or an arrow

plane.addEventListener("pointerdown", event => {
  if (event.button !== 0) return;
  plane.setPointerCapture(event.pointerId);
  pressed = event;
});

plane.addEventListener("pointermove", event => {
  if (!pressed) return;
  const far = Math.hypot(event.clientX - pressed.clientX, event.clientY - pressed.clientY) > 8;
  arrow = far ? [place(pressed), place(event)] : null;
  drawMarks();
});

plane.addEventListener("pointerup", event => {
  if (!pressed) return;
  const dragged = arrow;
  pressed = arrow = null;
  moveTo(place(event));
  if (dragged) drawAlong(...dragged);
  else drawPoint(event);
});

plane.addEventListener("pointercancel", () => {
  pressed = arrow = null;
  drawMarks();
});

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowDown: [0, -1], ArrowUp: [0, 1] };

plane.addEventListener("keydown", event => {
  const move = MOVES[event.key];
  const size = event.shiftKey ? 1 : 0.1;
  if (move) moveTo(point().map((x, i) => x + size * move[i]));
  else if (event.key === "Enter") drawPoint(event);
  else return;
  event.preventDefault(); // the page does not scroll
});

fields.prompt.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  drawHere();
});

find("form").addEventListener("input", drawMarks);
find("form").addEventListener("submit", event => {
  event.preventDefault();
  drawHere();
});
find("improve").addEventListener("click", improve);

fields.seed.value = start.seed;
fields.v.value = start.v;
fields.a.value = start.a;
drawMarks();
plane.focus({ preventScroll: true });
drawHere();
