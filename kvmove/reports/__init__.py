"""``kvmove report``: one page, as HTML and as Markdown, of what ``kvmove bench`` and the hardware suite found.

``sources`` reads, ``numbers`` computes, ``sections`` says it in words, tables and ``charts``, ``page`` writes it.
"""
