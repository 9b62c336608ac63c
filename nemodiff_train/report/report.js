// Replays a sample's decoding. The text is already on the page; this shows and hides parts of it.
(() => {
  "use strict";
  const DELAY = 350;
  const traces = JSON.parse(document.getElementById("traces").textContent);
  const viewer = document.getElementById("viewer");
  const articles = [...viewer.querySelectorAll("article")];
  const sample = document.getElementById("sample");
  const modes = [...viewer.querySelectorAll("input[name=mode]")];
  const slider = document.getElementById("frame");
  const words = document.getElementById("words");
  const play = document.getElementById("play");
  let timer = null;

  const article = () => articles[Number(sample.value)];
  const mode = () => modes.findIndex((choice) => choice.checked);
  const output = () => article().querySelectorAll(".output")[mode()];
  const trace = () => traces[Number(sample.value)][mode()];

  // A drafted token at its position: tentative, or struck through once the verifier has refused it.
  function chip(text, name, title) {
    const element = document.createElement(name === "del" ? "del" : "span");
    element.className = `drafted ${name}`;
    element.textContent = text;
    element.title = title;
    return element;
  }

  function chips(draft, verified) {
    const first = verified ? draft.accepted : 0;
    return draft.texts.slice(first).map((text, index) => {
      if (!verified) return chip(text, "tentative", `drafted, position ${index + 1}`);
      const kept = draft.accept_mask[first + index];
      return chip(text, "del", kept ? "dropped: after a rejection or the end" : "rejected");
    }).filter((element) => element.textContent);
  }

  function show() {
    const { steps, positions, drafts, frames } = trace();
    const frame = frames[Number(slider.value)];
    const text = output().querySelector(".text");
    text.querySelectorAll(".drafted").forEach((old) => old.remove());
    const draft = frame.draft === null ? null : drafts[frame.draft];
    const covered = draft ? draft.start + draft.texts.length : 0;
    let next = null;
    [...text.children].forEach((piece, index) => {
      const committed = steps[index] <= frame.step;
      if (!committed && next === null) next = piece;
      piece.classList.toggle("masked", !committed);
      piece.classList.toggle("covered", !committed && positions[index] < covered);
      piece.classList.toggle("fresh", steps[index] === frame.step && (!draft || frame.verified));
    });
    if (draft) chips(draft, frame.verified).forEach((element) => text.insertBefore(element, next));
    words.textContent = frame.words;
    slider.setAttribute("aria-valuetext", frame.words);
    // Follow the decoding inside the text's own box; the page itself stays where it is.
    if (next && timer !== null) text.scrollTop = next.offsetTop - text.offsetTop - text.clientHeight / 2;
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.classList.remove("playing");
    play.setAttribute("aria-label", "Play");
  }

  function start() {
    if (Number(slider.value) >= Number(slider.max)) slider.value = 0;
    play.classList.add("playing");
    play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => step(1), DELAY);
    show();
  }

  function step(frames) {
    slider.value = Number(slider.value) + frames;
    if (Number(slider.value) >= Number(slider.max)) stop();
    show();
  }

  // A newly chosen output is shown whole; the slider then goes back in time.
  function choose() {
    stop();
    articles.forEach((candidate) => { candidate.hidden = candidate !== article(); });
    article().querySelectorAll(".output").forEach((candidate) => { candidate.hidden = candidate !== output(); });
    const { frames } = trace();
    slider.max = frames.length - 1;
    slider.value = slider.max;
    slider.disabled = play.disabled = frames.length < 2;
    article().querySelector(".outputs").before(controls);
    show();
  }

  const controls = viewer.querySelector(".replay");
  viewer.querySelectorAll(".scripted").forEach((part) => { part.hidden = false; });
  viewer.classList.add("live");
  sample.addEventListener("change", choose);
  modes.forEach((choice) => choice.addEventListener("change", choose));
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => (timer === null ? start() : stop()));
  viewer.addEventListener("keydown", (event) => {
    const handlesKeys = event.target.matches("input, select, button");
    const frames = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (handlesKeys || event.altKey || event.ctrlKey || event.metaKey || slider.disabled) return;
    if (frames) { stop(); step(frames); }
    else if (event.key === " ") play.click();
    else return;
    event.preventDefault();
  });
  choose();
})();
