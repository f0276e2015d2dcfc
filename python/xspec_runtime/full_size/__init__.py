"""Two models of full size with random weights, and the accepted lengths of a recording.

Every pass is computed; only what the target would say is replaced by the recorded outcome. So times
and memory are those of the real models, and tokens mean nothing.
"""
