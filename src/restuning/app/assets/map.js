const svg = () => element.querySelector('svg.map')
const recolour = how => {
  element.querySelectorAll('svg.map circle').forEach(dot => dot.setAttribute('fill', dot.dataset[how]))
  element.querySelectorAll('button[data-colour]').forEach(b => b.setAttribute('aria-pressed', b.dataset.colour === how))
}
const zoom = (factor, x = 0.5, y = 0.5) => {
  const view = svg().viewBox.baseVal
  const width = Math.min(1000, Math.max(40, view.width * factor))
  view.x = Math.min(1000 - width, Math.max(0, view.x + (view.width - width) * x))
  view.y = Math.min(1000 - width, Math.max(0, view.y + (view.height - width) * y))
  view.width = view.height = width
  svg().style.setProperty('--dot', `${7 * Math.sqrt(width / 1000)}px`)
}
const at = event => {
  const view = svg().viewBox.baseVal, box = svg().getBoundingClientRect()
  return [view.x + (event.clientX - box.left) / box.width * view.width,
          view.y + (event.clientY - box.top) / box.height * view.height]
}
const inside = ([x, y], polygon) => polygon.reduce((odd, [ax, ay], i) => {
  const [bx, by] = polygon[(i || polygon.length) - 1]
  return (ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax ? !odd : odd
}, false)
let lasso = null
const draw = () => svg().querySelector('.lasso').setAttribute('points', (lasso || []).map(p => p.join()).join(' '))
element.addEventListener('click', event => {
  const own = event.target.closest('button')?.dataset
  if (!own) return
  if (own.colour) recolour(own.colour)
  if (own.zoom) zoom(Number(own.zoom))
  if (own.act) trigger('click', {act: own.act, keys: [], label: '', page: 0, what: own.what})
})
element.addEventListener('wheel', event => {
  if (!event.target.closest('svg.map')) return
  event.preventDefault()
  const box = svg().getBoundingClientRect()
  zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height)
}, {passive: false})
element.addEventListener('pointerdown', event => {
  if (!event.target.closest('svg.map')) return
  lasso = [at(event)]
  svg().setPointerCapture(event.pointerId)
  event.preventDefault()
})
element.addEventListener('pointermove', event => { if (lasso) { lasso.push(at(event)); draw() } })
element.addEventListener('pointerup', event => {
  if (!lasso) return
  const polygon = lasso
  lasso = null
  draw()
  let keys = []
  if (polygon.length < 4) {
    const [x, y] = polygon[0]
    const near = [...svg().querySelectorAll('circle')].map(dot =>
      [Math.hypot(dot.cx.baseVal.value - x, dot.cy.baseVal.value - y), dot.dataset.key]).sort((a, b) => a[0] - b[0])
    if (near.length && near[0][0] < 20) keys = [near[0][1]]
  } else {
    keys = [...svg().querySelectorAll('circle')].filter(dot =>
      inside([dot.cx.baseVal.value, dot.cy.baseVal.value], polygon)).map(dot => dot.dataset.key)
  }
  if (keys.length) trigger('click', {act: 'lasso', keys, label: '', page: 0, what: ''})
})
