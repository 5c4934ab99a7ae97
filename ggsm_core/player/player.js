const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
const slider = root.querySelector("input");
const button = root.querySelector("button");
const said = root.querySelector("output");
const now = root.querySelector(".player-now");
const stages = [...root.querySelectorAll("figure")];
const length = data.margin.length;

function readable(colour) {
  // Black or white, whichever stands out more: WCAG's relative luminance.
  const [r, g, b] = [1, 3, 5].map((at) => {
    const part = parseInt(colour.slice(at, at + 2), 16) / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}
const ink = data.palette.map(readable);

function mask(film, frame) {
  // The visibility of key j to query i, in hundredths; a recipe without pairs weighs keys alone.
  if (!film.masks) return (i, j) => Math.round(film.weights[frame][j] / 10);
  const upper = [];
  const runs = film.masks[frame];
  for (let at = 0; at < runs.length; at += 2) {
    for (let n = 0; n < runs[at + 1]; n++) upper.push(runs[at]);
  }
  return (i, j) => upper[i * length - (i * (i + 1)) / 2 + j - i - 1];
}

function paint(canvas, film, frame) {
  const pen = canvas.getContext("2d");
  const seen = mask(film, frame);
  pen.clearRect(0, 0, length + 2, length + 2);
  for (let i = 0; i < length; i++) {
    pen.fillStyle = data.margin[i];
    pen.fillRect(0, i, 1, 1);
    pen.fillRect(i + 2, length + 1, 1, 1);
    pen.fillStyle = data.palette[100];
    pen.fillRect(2, i, i + 1, 1);
    for (let j = i + 1; j < length; j++) {
      pen.fillStyle = data.palette[seen(i, j)];
      pen.fillRect(j + 2, i, 1, 1);
    }
  }
}

function phase(film, frame) {
  const step = data.steps[frame];
  const open = film.open[frame];
  const state = open <= 0.001 ? "causal" : open >= 0.999 ? "open" : "half-open";
  return step >= 0 && step < film.warm ? state + ", warm-up" : state;
}

function show() {
  const frame = Number(slider.value);
  const step = data.steps[frame];
  const where = step >= 0 ? `step ${step} of ${data.last}` : frame ? "after training" : "before training";
  slider.setAttribute("aria-valuetext", where);
  said.textContent = where;
  now.hidden = step < 0;
  if (step >= 0) now.style.left = data.now[frame] + "%";
  stages.forEach((stage, index) => {
    const film = data.films[index];
    const loss = step < 0 ? "" : `, loss ${film.loss[frame].toFixed(3)}`;
    stage.querySelector(".player-said").textContent =
      `${phase(film, frame)}: mean visibility ${film.open[frame].toFixed(3)}${loss}`;
    paint(stage.querySelector("canvas"), film, frame);
    stage.querySelectorAll("li").forEach((token, j) => {
      const weight = film.weights[frame][j];
      const shade = j === 0 ? 100 : Math.round(weight / 10); // the first token is never in the future
      token.style.backgroundColor = data.palette[shade];
      token.style.color = ink[shade];
      token.querySelector("b").textContent = j === 0 ? "–" : (weight / 1000).toFixed(3);
    });
  });
}

let timer = null;
function stop() {
  clearInterval(timer);
  timer = null;
  button.textContent = "Play";
}
button.addEventListener("click", () => {
  if (timer !== null) return stop();
  if (slider.value === slider.max) slider.value = 0;
  button.textContent = "Stop";
  timer = setInterval(() => {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) stop();
  }, 200);
});
slider.max = data.steps.length - 1;
slider.addEventListener("input", show);
root.classList.add("player-on");
root.querySelectorAll("[hidden]").forEach((part) => (part.hidden = false));
show();
