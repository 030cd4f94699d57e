"""How a Diffusers model is adopted, hooked and given back; files in the order of a call, each imports only later ones.

patch: `apply` and `remove`, and guidance on and off.
hooks: the hooks on a transformer's forward passes, put on and taken off.
processors: attention processors that send their products to a layer.
run: the state of an applied transformer, its layers, and the way of one attention call.
compiled: the ops by which a compiled graph does the same.
targets, parallel: what of a pipeline is adopted; models that are split over ranks.
models, geometry: the table of model classes, and the token grid that is read from a forward pass.
masks, clock, call: masks over keys; step, run and branch of a pass; the arguments of one attention product.
copies, sdpa: copies of adopted modules; torch's attention function and its replacements.
"""
