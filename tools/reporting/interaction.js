// Values under the pointer, zoom and legends of the plots that tools/reporting/panels.py draws.
// A plot is an SVG with its values in data-plot. Without this script it stays as it is.
(() => {
  const MIN_DRAG = 8
  const tip = document.body.appendChild(document.createElement("div"))
  tip.className = "tip"

  function set(element, attributes) {
    for (const name in attributes) element.setAttribute(name, attributes[name])
    return element
  }
  const make = (tag, attributes, parent) =>
    set(parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", tag)), attributes)

  function compact(value) {
    for (const [size, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= size) return Number((value / size).toPrecision(4)) + suffix
    return String(Number(value.toPrecision(4)))
  }

  function ticks(low, high, log) {
    const found = []
    if (log && high / low >= 4) {
      for (let tick = 2 ** Math.ceil(Math.log2(low)); tick <= high; tick *= 2) found.push(tick)
      return found
    }
    const rough = (high - low) / 5, size = 10 ** Math.floor(Math.log10(rough))
    const step = [1, 2, 5, 10].find(times => times * size >= rough) * size
    for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step)
    return found
  }

  class Scale { // between values, coordinates as drawn, and coordinates as shown by a zoom
    constructor({low, high, log}, first, last) {
      Object.assign(this, {log, first, last, factor: 1, shift: 0})
      this.low = this.by(low)
      this.per = (last - first) / (this.by(high) - this.low)
    }
    by(value) { return this.log ? Math.log(Math.max(value, 1e-9)) : value }
    shown(drawn) { return this.factor * drawn + this.shift }
    place(value) { return this.shown(this.first + (this.by(value) - this.low) * this.per) }
    value(shown) {
      const by = this.low + ((shown - this.shift) / this.factor - this.first) / this.per
      return this.log ? Math.exp(by) : by
    }
    stretch(a, b) { // so that the shown range a..b fills the plot
      const start = Math.min(this.first, this.last), end = Math.max(this.first, this.last)
      const times = (end - start) / (b - a)
      this.shift = (this.shift - Math.max(a, start)) * times + start
      this.factor *= times
    }
    ticks() { return ticks(...[this.first, this.last].map(end => this.value(end)), this.log) }
  }

  function setUp(svg) {
    const plot = JSON.parse(svg.dataset.plot), [left, top, right, bottom] = plot.box
    const x = new Scale(plot.x, left, right), y = new Scale(plot.y, bottom, top)
    const groups = plot.series.map(one => one.ids.map(id => svg.getElementById(id)).filter(g => g))
    const pieces = [] // the clip stays while the pieces inside it move
    for (const group of svg.querySelectorAll(`[id^=${plot.id}-]`)) {
      const clipped = group.querySelectorAll("[clip-path]")
      if (clipped.length) {
        const clip = {"clip-path": clipped[0].getAttribute("clip-path")}
        const outer = make("g", clip, group.parentNode)
        group.replaceWith(outer)
        outer.append(group)
        for (const one of clipped) one.removeAttribute("clip-path")
      }
      for (const piece of group.querySelectorAll("path, use")) if (!piece.closest("defs"))
        pieces.push([piece, ...["x", "y"].map(name => Number(piece.getAttribute(name)))])
    }
    const layer = make("g", {class: "zoomed"}, svg)
    const cross = make("line", {class: "cross", y1: top, y2: bottom, visibility: "hidden"}, svg)
    const frame = make("rect", {class: "frame", visibility: "hidden"}, svg)
    let start = null // of a drag

    function redraw(zoomed) {
      const move = `matrix(${x.factor} 0 0 ${y.factor} ${x.shift} ${y.shift})`
      for (const [piece, px, py] of pieces)
        set(piece, piece.tagName === "path" ? {transform: move} : {x: x.shown(px), y: y.shown(py)})
      for (const tick of svg.querySelectorAll(".tick"))
        tick.style.visibility = zoomed ? "hidden" : ""
      layer.replaceChildren()
      const label = (value, at) => make("text", at, layer).textContent = compact(value)
      if (zoomed) for (const tick of x.ticks())
        label(tick, {x: x.place(tick), y: bottom + 14, "text-anchor": "middle"})
      if (zoomed) for (const tick of y.ticks())
        label(tick, {x: left - 4, y: y.place(tick) + 3, "text-anchor": "end"})
    }

    function nearest([px, py]) { // the values at the place nearest to the pointer
      const found = plot.series.flatMap((series, index) => {
        if (!series.x.length || groups[index].every(g => g.style.display === "none")) return []
        const far = series.x.map((value, i) => Math.abs(x.place(value) - px) +
          (series.texts ? Math.abs(y.place(series.y[i]) - py) : 0))
        const i = far.indexOf(Math.min(...far))
        return [{series, i, at: series.x[i], far: far[i]}]
      }).sort((a, b) => a.far - b.far)
      return found.length && found[0].series.texts ? [found[0]]
        : found.filter(one => one.at === found[0].at)
    }

    function tell(event, point) {
      const found = point ? nearest(point) : []
      tip.style.display = found.length ? "block" : "none"
      cross.setAttribute("visibility", found.length ? "visible" : "hidden")
      if (!found.length) return
      set(cross, {x1: x.place(found[0].at), x2: x.place(found[0].at)})
      tip.replaceChildren(found[0].series.texts ? "" : `${plot.x.name} ${compact(found[0].at)}`)
      for (const {series, i} of found) {
        const row = tip.appendChild(document.createElement("div"))
        row.appendChild(document.createElement("i")).style.background = series.color
        row.append(series.texts ? series.texts[i] : `${series.name}: ${compact(series.y[i])}`)
      }
      const most = document.documentElement.clientWidth - tip.offsetWidth - 8
      tip.style.left = `${Math.max(8, Math.min(event.pageX + 14, most))}px`
      tip.style.top = `${event.pageY + 16}px`
    }

    function range([px, py]) { // of a drag; a flat one zooms only horizontally
      const rows = Math.abs(py - start[1]) < MIN_DRAG ? [top, bottom] : [start[1], py]
      return [[start[0], px], rows].map(ends => ends.sort((a, b) => a - b))
    }
    const handlers = {
      pointerdown: point => start = point,
      pointermove(point) {
        if (!start || !point) return
        const [[a, b], [c, d]] = range(point)
        set(frame, {x: a, y: c, width: b - a, height: d - c, visibility: "visible"})
      },
      pointerup(point) {
        const [across, along] = start && point ? range(point) : [[0, 0]]
        if (across[1] - across[0] >= MIN_DRAG) {
          x.stretch(...across)
          y.stretch(...along)
          redraw(true)
        }
        handlers.pointerleave()
      },
      pointerleave() { start = null; frame.setAttribute("visibility", "hidden") },
      dblclick() { for (const axis of [x, y]) axis.factor = 1, axis.shift = 0; redraw(false) },
    }
    for (const name in handlers) svg.addEventListener(name, event => {
      const {x: px, y: py} = new DOMPoint(event.clientX, event.clientY)
        .matrixTransform(svg.getScreenCTM().inverse())
      const inside = px >= left && px <= right && py >= top && py <= bottom
      handlers[name](inside ? [px, py] : null)
      tell(event, inside ? [px, py] : null) // after a zoom, by the new scales
    })
  }

  for (const svg of document.querySelectorAll("svg[data-plot]")) setUp(svg)
  for (const button of document.querySelectorAll(".legend button"))
    button.addEventListener("click", () => {
      const display = button.classList.toggle("off") ? "none" : ""
      for (const svg of button.closest(".panel, .figure").querySelectorAll("svg[data-plot]"))
        for (const {name, ids} of JSON.parse(svg.dataset.plot).series)
          if (name === button.dataset.name)
            for (const id of ids) svg.getElementById(id).style.display = display
    })
})()
