const picked = () => [...element.querySelectorAll('input.pick:checked')].map(box => box.value)
element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]')
  if (!button) return
  const own = button.dataset
  const select = element.querySelector('select.class')
  const typed = element.querySelector('input.new-class')
  if (own.act === 'all') {
    const boxes = [...element.querySelectorAll('input.pick')]
    const on = boxes.some(box => !box.checked)
    boxes.forEach(box => { box.checked = on })
    return
  }
  trigger('click', {
    act: own.act,
    keys: own.key ? [own.key] : picked(),
    label: own.label ?? ((typed && typed.value.trim()) || (select && select.value) || ''),
    page: Number(own.page || 0),
    what: own.what || '',
  })
})
// a card that is dragged to a class takes the others that are picked with it
const kind = 'text/x-restuning'
element.addEventListener('dragstart', event => {
  const key = event.target.closest('.rt-card')?.querySelector('input.pick').value
  if (key) event.dataTransfer.setData(kind, JSON.stringify(picked().includes(key) ? picked() : [key]))
})
const target = event => event.dataTransfer.types.includes(kind) && event.target.closest('.rt-chips [data-what^="class:"]')
const mark = chip => element.querySelectorAll('.rt-over, .rt-chips [data-what]').forEach(one => one.classList.toggle('rt-over', one === chip))
element.addEventListener('dragover', event => {
  const chip = target(event)
  mark(chip)
  if (chip) event.preventDefault()
})
element.addEventListener('dragleave', () => mark(null))
element.addEventListener('drop', event => {
  const chip = target(event)
  mark(null)
  if (!chip) return
  event.preventDefault()
  const keys = JSON.parse(event.dataTransfer.getData(kind))
  trigger('click', {act: 'label', keys, label: chip.dataset.what.slice('class:'.length), page: 0, what: ''})
})
