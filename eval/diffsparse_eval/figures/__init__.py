"""The figures of the docs, drawn from committed rows and from the library's own objects."""
