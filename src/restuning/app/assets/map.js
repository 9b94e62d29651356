// a dot: [x, y, key, class, wrong, confidence, title], x and y from 0 to 1000
let dots = [], colours = [], how = 'class', view = {x: 0, y: 0, size: 1000}, lasso = null
const canvas = () => element.querySelector('canvas.map')
const fill = dot => how === 'class' ? colours[dot[3]] : how === 'error' ? (dot[4] ? '#c2283a' : '#b9c0cc')
  : `hsl(222 60% ${90 - 55 * dot[5]}%)`
const draw = () => {
  const c = canvas()
  if (!c) return
  const side = c.clientWidth, sharp = window.devicePixelRatio || 1
  c.width = c.height = side * sharp
  const pen = c.getContext('2d'), scale = c.width / view.size
  const radius = sharp * Math.max(2.2, 5.5 * Math.min(1, Math.sqrt(400 / (dots.length || 1))) * Math.sqrt(1000 / view.size))
  pen.lineWidth = sharp * .7
  pen.strokeStyle = '#fff'
  for (const dot of [...dots].sort((a, b) => a[4] - b[4])) {
    pen.beginPath()
    pen.arc((dot[0] - view.x) * scale, (dot[1] - view.y) * scale, radius, 0, 2 * Math.PI)
    pen.fillStyle = fill(dot)
    pen.fill()
    pen.stroke()
  }
  if (lasso) {
    pen.beginPath()
    for (const [x, y] of lasso) pen.lineTo((x - view.x) * scale, (y - view.y) * scale)
    pen.closePath()
    pen.fillStyle = 'rgb(31 79 209 / 12%)'
    pen.strokeStyle = '#1f4fd1'
    pen.lineWidth = sharp * 1.5
    pen.fill()
    pen.stroke()
  }
  element.querySelectorAll('button[data-colour]').forEach(b => b.setAttribute('aria-pressed', b.dataset.colour === how))
}
const zoom = (factor, x = 0.5, y = 0.5) => {
  const size = Math.min(1000, Math.max(40, view.size * factor))
  const kept = (from, at) => Math.min(1000 - size, Math.max(0, from + (view.size - size) * at))
  view = {x: kept(view.x, x), y: kept(view.y, y), size}
  draw()
}
const at = event => {
  const box = canvas().getBoundingClientRect()
  return [view.x + (event.clientX - box.left) / box.width * view.size,
          view.y + (event.clientY - box.top) / box.height * view.size]
}
const nearest = ([x, y]) => {
  const found = dots.reduce((best, dot) => {
    const far = Math.hypot(dot[0] - x, dot[1] - y)
    return far < best[0] ? [far, dot] : best
  }, [view.size * .02, null])
  return found[1]
}
const inside = ([x, y], polygon) => polygon.reduce((odd, [ax, ay], i) => {
  const [bx, by] = polygon[(i || polygon.length) - 1]
  return (ay > y) !== (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax ? !odd : odd
}, false)
watch('value', () => {
  const c = canvas()
  if (!c) return
  dots = JSON.parse(c.dataset.dots)
  colours = JSON.parse(c.dataset.colours)
  view = {x: 0, y: 0, size: 1000}
  draw()
  new ResizeObserver(draw).observe(c)
})
element.addEventListener('click', event => {
  const own = event.target.closest('button')?.dataset
  if (!own) return
  if (own.colour) { how = own.colour; draw() }
  if (own.zoom) zoom(Number(own.zoom))
  if (own.act) trigger('click', {act: own.act, keys: [], label: '', page: 0, what: own.what})
})
element.addEventListener('wheel', event => {
  if (!event.target.closest('canvas.map')) return
  event.preventDefault()
  const box = canvas().getBoundingClientRect()
  zoom(event.deltaY > 0 ? 1.2 : 1 / 1.2, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height)
}, {passive: false})
element.addEventListener('pointerdown', event => {
  if (!event.target.closest('canvas.map')) return
  lasso = [at(event)]
  canvas().setPointerCapture(event.pointerId)
  event.preventDefault()
})
element.addEventListener('pointermove', event => {
  if (lasso) { lasso.push(at(event)); draw() }
  else if (event.target.closest('canvas.map')) element.querySelector('.rt-hover').textContent = nearest(at(event))?.[6] || '\u00a0'
})
element.addEventListener('pointerup', () => {
  if (!lasso) return
  const polygon = lasso
  lasso = null
  draw()
  const one = nearest(polygon[0])
  const found = polygon.length < 4 ? (one ? [one] : []) : dots.filter(dot => inside(dot, polygon))
  if (found.length) trigger('click', {act: 'lasso', keys: found.map(dot => dot[2]), label: '', page: 0, what: ''})
})
