"""HTTP by httptools, which bounds no head of a request itself."""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from restuning.serving.settings import HEAD_BYTES


class Bounded(HttpToolsProtocol):
    """uvicorn's, which answers 400 where a request's line and headers are longer than HEAD_BYTES."""

    _head = 0
    _in_head = True

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        self._in_head, self._head = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> Any:
        self._in_head = False
        return super().on_headers_complete()
