element.addEventListener('click', event => {
  const button = event.target.closest('[data-act]')
  if (!button) return
  const picked = [...element.querySelectorAll('input.pick:checked')].map(box => box.value)
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
    keys: own.key ? [own.key] : picked,
    label: own.label ?? ((typed && typed.value.trim()) || (select && select.value) || ''),
    page: Number(own.page || 0),
    what: own.what || '',
  })
})
