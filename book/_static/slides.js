// A chapter as slides, for a lecture: page.html?slides. What is said, and the output that follows it, is one slide.
// Arrow keys or the buttons turn them, C shows the code, Escape leads back to the page.
document.addEventListener("DOMContentLoaded", () => {
  if (!new URLSearchParams(location.search).has("slides")) return;
  const deck = [];
  const collect = (section) => {
    const heading = section.querySelector(":scope > h1, :scope > h2, :scope > h3");
    let slide = null;
    for (const part of section.children) {
      if (part.matches("section")) {
        collect(part);
        slide = null;
        continue;
      }
      const silent = part.matches(".cell") && !part.querySelector(":scope > .cell_output");
      const empty = !part.textContent.trim() && !part.querySelector("img");
      if (part === heading || silent || empty || part.matches("details, .tag_solution")) continue;
      if (!slide) deck.push((slide = [heading]));
      slide.push(part);
      if (part.matches(".cell")) slide = null;
    }
  };
  collect(document.querySelector("article section"));

  const bar = document.createElement("nav");
  bar.className = "slides-bar";
  bar.ariaLabel = "Slides";
  bar.innerHTML =
    '<button type="button" aria-label="Previous slide">‹</button><output></output>' +
    '<button type="button" aria-label="Next slide">›</button><a>Leave</a>';
  const [back, on] = bar.querySelectorAll("button");
  const leave = bar.querySelector("a");
  leave.href = location.pathname;
  let at = 0;
  const show = (number) => {
    at = Math.min(Math.max(number, 0), deck.length - 1);
    deck.flat().forEach((part) => part.classList.remove("on"));
    deck[at].forEach((part) => part.classList.add("on"));
    bar.querySelector("output").textContent = `${at + 1} of ${deck.length}`;
    history.replaceState(null, "", `#slide-${at + 1}`);
    scrollTo(0, 0);
  };
  back.addEventListener("click", () => show(at - 1));
  on.addEventListener("click", () => show(at + 1));
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (["ArrowRight", "PageDown"].includes(event.key)) show(at + 1);
    else if (["ArrowLeft", "PageUp"].includes(event.key)) show(at - 1);
    else if (event.key === "c") document.documentElement.classList.toggle("with-code");
    else if (event.key === "Escape") leave.click();
    else return;
    event.preventDefault();
  });
  document.documentElement.classList.add("slides");
  document.body.append(bar);
  show((Number(location.hash.replace("#slide-", "")) || 1) - 1);
});
