"""prac inside other libraries: a callback for the ``Trainer`` of transformers, and one for Lightning's."""
