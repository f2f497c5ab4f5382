// Sort a table by a click on its header, show hidden columns, enlarge a picture. The page reads well without it.
for (const table of document.querySelectorAll("table.runs")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = header.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "ascending";
      const sign = down ? -1 : 1;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.sort;
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what has no value stays last
        const [m, n] = [Number(x), Number(y)];
        const numbers = !Number.isNaN(m) && !Number.isNaN(n);
        return sign * (numbers ? m - n : x.localeCompare(y));
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
document.querySelector("#all-metrics")?.addEventListener("change", (event) => {
  for (const table of document.querySelectorAll("table.runs")) table.classList.toggle("all", event.target.checked);
});
document.querySelector("#thumb")?.addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--thumb", `${event.target.value}px`);
});
// a point leads to its row, also where the table is folded
addEventListener("hashchange", () => {
  const fold = document.querySelector(location.hash || "#none")?.closest("details");
  if (fold && !fold.open) {
    fold.open = true;
    document.querySelector(location.hash).scrollIntoView({ block: "center" });
  }
});
const dialog = document.querySelector("dialog");
for (const link of document.querySelectorAll("button.picture")) {
  link.addEventListener("click", () => {
    const image = link.querySelector("img");
    dialog.querySelector("img").src = image.src;
    dialog.querySelector("img").className = image.className;
    dialog.querySelector("p").textContent = image.alt;
    dialog.showModal();
  });
}
dialog?.addEventListener("click", () => dialog.close());
