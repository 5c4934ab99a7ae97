// A list of references is announced as a list; so that it is one, its entries are list items.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll('.citation-list[role="list"] > *').forEach((entry) => entry.setAttribute("role", "listitem"));
});
