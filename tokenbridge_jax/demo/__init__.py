"""A page that draws and edits images with a trained model (`tokenbridge demo`).

`drawing.py` draws the images, `page.py` builds the page. Only `page.py` needs Gradio.
"""
