"""Does a trained network compress and sparsify, layer by layer, as the theory says?"""
