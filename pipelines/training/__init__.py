"""How the embedded model was made: data, parts, training, gates. Not installed; run it from a checkout.

`python -m training.train`, with the folder `pipelines` on the path (an editable install has it there).
"""
