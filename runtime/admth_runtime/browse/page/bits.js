// Codes as strips of small squares, sixteen a row, most significant bit first.

const SIDE = 8;
const STEP = 9;
const PER_ROW = 16;

/** The bits of a hexadecimal code, most significant first: an array of booleans. */
export function bitsOf(hex) {
  return [...hex].flatMap((digit) => {
    const value = parseInt(digit, 16);
    return [8, 4, 2, 1].map((weight) => (value & weight) !== 0);
  });
}

/** The query's code; a bit of a small margin |logit| is faint. Without margins every bit is full. */
export function queryStrip(hex, margins) {
  const most = margins ? Math.max(...margins, 1e-9) : 1;
  return strip(bitsOf(hex), (bit, place) => ({
    kind: bit ? "one" : "zero",
    opacity: margins ? 0.18 + 0.82 * Math.sqrt(margins[place] / most) : 1,
    title: `bit ${place}: ${bit ? 1 : 0}` + (margins ? `, |logit| ${margins[place].toFixed(2)}` : ""),
  }), `query code ${hex}`);
}

/** A neighbour's code with the bits marked that differ from the query's. */
export function neighbourStrip(hex, queryHex) {
  const query = bitsOf(queryHex);
  const bits = bitsOf(hex);
  const places = bits.flatMap((bit, place) => (bit === query[place] ? [] : [place]));
  const label = places.length ? `code ${hex}: differs at bits ${places.join(", ")}` : `code ${hex}: equal to the query's`;
  return strip(bits, (bit, place) => {
    const differs = bit !== query[place];
    const kind = differs ? (bit ? "differs" : "differs-zero") : bit ? "equal-one" : "equal-zero";
    return { kind, opacity: 1, title: "" };
  }, label);
}

function strip(bits, look, label) {
  const rows = Math.ceil(bits.length / PER_ROW);
  const svg = element("svg", { class: "bits", viewBox: `0 0 ${PER_ROW * STEP - 1} ${rows * STEP - 1}`, role: "img", "aria-label": label });
  bits.forEach((bit, place) => {
    const { kind, opacity, title } = look(bit, place);
    const hollow = kind.endsWith("zero") ? 1 : 0;
    const rect = element("rect", {
      class: kind,
      x: (place % PER_ROW) * STEP + hollow,
      y: Math.floor(place / PER_ROW) * STEP + hollow,
      width: SIDE - 2 * hollow,
      height: SIDE - 2 * hollow,
      rx: 1.5,
      "fill-opacity": opacity,
      "stroke-opacity": opacity,
    });
    if (title) {
      const text = element("title", {});
      text.textContent = title;
      rect.append(text);
    }
    svg.append(rect);
  });
  return svg;
}

function element(name, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}
