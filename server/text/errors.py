class TextError(ValueError):
    """Text, messages, a template or a tokenizer that cannot be used; `param` is the request field it came from."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
