// The theme makes these elements when a page has loaded. A table that scrolls must be within reach of the keyboard, and
// the buttons of a code block are no landmark.
new MutationObserver(() => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) box.tabIndex = 0;
  for (const buttons of document.querySelectorAll(".md-code__nav:not([role])")) buttons.setAttribute("role", "none");
}).observe(document.documentElement, { childList: true, subtree: true });
