"""How the page of `tessera inspect html=FILE` looks: tokens by what is learnt, images by colour."""

NUM_COLOURS = 8

STYLE = """:root { --trained: light-dark(#bfe8c4, #1f5a2c);
  --special: light-dark(#7a3fb0, #c99bf0); }
h2 small + small { float: right; font-size: .85rem; }
h3 { font-size: .85rem; font-weight: 500; margin: .9rem 0 .3rem; padding-top: .5rem;
  border-top: 1px solid var(--line); color: var(--quiet); }
.legend { margin: 1.2rem 0 0; font-size: .9rem; }
.strip { display: flex; height: 1.3rem; border-radius: 4px; overflow: hidden; font-size: .7rem;
  line-height: 1.3rem; text-align: center; background: var(--line); }
.strip span { min-width: 0; overflow: hidden; border-right: 1px solid var(--card);
  background: color-mix(in srgb, var(--mark) 22%, var(--card)); }
.strip .pad {
  background: repeating-linear-gradient(45deg, var(--line) 0 3px, var(--card) 3px 7px); }
.text, .t { font: 13px/1.7 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.t { box-shadow: inset -1px 0 rgb(128 128 128 / 35%); border-radius: 2px; padding-bottom: 1px; }
.t:empty::before { content: "\\2009"; }
.t:hover { outline: 2px solid var(--mark); }
.parts .t { color: var(--quiet); }
.parts .y, .y { background: var(--trained); color: var(--ink); }
.parts .s, .s { color: var(--special); font-weight: 600; }
.around { display: inline-block; max-width: 3ch; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; vertical-align: middle; }
.l { margin: 0 .25em 0 .1em; padding: 0 .35em; border: 1px solid currentColor; border-radius: 4px;
  color: var(--mark); font-size: .75rem; font-weight: 600; }
.v { border-bottom: 2px solid light-dark(hsl(var(--hue) 70% 42%), hsl(var(--hue) 70% 62%)); }
.image { display: inline-block; position: relative; vertical-align: middle; line-height: 0;
  margin: 2px; border: 3px solid light-dark(hsl(var(--hue) 70% 42%), hsl(var(--hue) 70% 62%));
  border-radius: 5px; }
.image img { display: block; pointer-events: none; width: 64px; height: 64px; border-radius: 2px; }
.image:hover { transform: scale(3); transform-origin: bottom right; z-index: 1; }
.image::after { content: attr(data-number); position: absolute; right: 0;
  bottom: 0; padding: 0 3px; font: 10px/13px system-ui; color: #fff; background: rgb(0 0 0 / 65%); }
"""


def style_of(num_images: int) -> str:
    """Return all CSS, for rows of so many images: pointing shows who looks at which."""
    hues = [
        f".c{n} {{ --hue: {n * 360 // NUM_COLOURS}; }}" for n in range(min(num_images, NUM_COLOURS))
    ]
    pointed = [
        f"section:has(.p{n}:hover) .v{n} {{ background: hsl(var(--hue) 70% 50% / 45%); }}\n"
        f"section:has(.v{n}:hover) .p{n} {{ outline: 4px solid hsl(var(--hue) 90% 50%); }}"
        for n in range(1, num_images + 1)
    ]
    return "\n".join([STYLE.rstrip(), *hues, *pointed, ""])
