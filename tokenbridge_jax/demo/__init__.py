"""A page that draws and edits images with a trained model (`tokenbridge demo`).

`drawing.py` says what it does, `page.py` what it looks like; only `page.py` needs Gradio.
"""
