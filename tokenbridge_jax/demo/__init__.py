"""A page that draws and edits images with a trained model (`tokenbridge demo`).

`drawing.py` is what it does, `page.py` what it looks like; the latter alone needs Gradio.
"""
