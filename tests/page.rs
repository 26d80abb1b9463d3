//! The web page in a real browser: headless Chromium, driven over the WebDriver protocol through ChromeDriver.
//!
//! Without a browser the test says SKIP on stderr and passes; `make tools` installs one on Debian. With the variable
//! SCREENSHOTS set to a folder, pictures of the page are left there.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cli::{nfold, with_demo};
use crate::process::{Server, ask, data};

/// A browser window. Closed when dropped.
struct Browser {
    driver: Child,
    address: SocketAddr,
    session: String,
}

impl Browser {
    /// `None` if this machine has no browser; says so on stderr.
    fn open() -> Option<Self> {
        let window = Self::open_any();
        if window.is_none() {
            crate::cli::skip("no chromium with chromedriver here, so the page was not tested (make tools)");
        }
        window
    }

    fn open_any() -> Option<Self> {
        let browser = on_path(&["chromium", "chromium-browser", "google-chrome"])?;
        let mut driver =
            Command::new(on_path(&["chromedriver"])?).arg("--port=0").stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(driver.stdout.take().unwrap()).lines();
        let said = "started successfully on port ";
        let port = lines.find_map(|l| l.unwrap().split_once(said).map(|(_, port)| port.to_string())).unwrap();
        std::thread::spawn(move || lines.for_each(drop));
        let port: u16 = port.trim_end_matches('.').parse().unwrap();
        let mut window = Self { driver, address: SocketAddr::from(([127, 0, 0, 1], port)), session: String::new() };
        let flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run \
                     --disable-background-networking --disable-component-update --disable-sync --window-size=900,1000";
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": { "binary": browser, "args": flags },
        } } });
        let made = window.call("", wanted);
        window.session = format!("/{}", made["sessionId"].as_str().unwrap());
        Some(window)
    }

    fn call(&self, path: &str, body: Value) -> Value {
        let target = format!("/session{}{path}", self.session);
        let answer = ask(self.address, "POST", &target, &[], body.to_string().as_bytes()).unwrap();
        let answer = answer.json();
        assert!(answer["value"]["error"].is_null(), "{path} {body}: {answer}");
        answer["value"].clone()
    }

    /// A command of the browser's own protocol.
    fn raw(&self, command: &str, parameters: Value) -> Value {
        self.call("/goog/cdp/execute", json!({ "cmd": command, "params": parameters }))
    }

    fn visit(&self, server: &Server) {
        self.call("/url", json!({ "url": format!("http://{}/", server.http) }));
    }

    /// The value of a JavaScript expression in the page.
    fn value(&self, expression: &str) -> Value {
        self.call("/execute/sync", json!({ "script": format!("return {expression}"), "args": [] }))
    }

    fn text(&self, selector: &str) -> String {
        self.value(&format!("document.querySelector({selector:?})?.innerText ?? ''")).as_str().unwrap().into()
    }

    /// Text that may be folded away.
    fn content(&self, selector: &str) -> String {
        self.value(&format!("document.querySelector({selector:?})?.textContent ?? ''")).as_str().unwrap().into()
    }

    /// Waits until an expression is true.
    fn until(&self, expression: &str) {
        let deadline = Instant::now() + Duration::from_secs(15);
        while self.value(&format!("Boolean({expression})")) != json!(true) {
            let page = self.value("document.body.innerText");
            assert!(Instant::now() < deadline, "never so: {expression}\n{page}");
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Selects files as the file dialog would.
    fn choose(&self, files: &[&Path]) {
        let input = self.call("/element", json!({ "using": "css selector", "value": "#files" }));
        let id = input.as_object().unwrap().values().next().unwrap().as_str().unwrap();
        let names: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
        self.call(&format!("/element/{id}/value"), json!({ "text": names.join("\n") }));
    }

    /// Drops a file as a mouse would.
    fn drop_file(&self, file: &Path) {
        for kind in ["dragEnter", "dragOver", "drop"] {
            let files = json!([file.display().to_string()]);
            let dragged = json!({ "items": [], "files": files, "dragOperationsMask": 1 });
            self.raw("Input.dispatchDragEvent", json!({ "type": kind, "x": 300, "y": 150, "data": dragged }));
        }
    }

    /// Selects the model at an index of the list.
    fn pick(&self, index: usize) {
        let picked = format!("document.querySelector('#model').selectedIndex = {index}");
        self.value(&format!("({picked}, document.querySelector('#model').dispatchEvent(new Event('change')))"));
    }

    fn press(&self, key: &str) {
        let keys = json!([{ "type": "keyDown", "value": key }, { "type": "keyUp", "value": key }]);
        self.call("/actions", json!({ "actions": [{ "type": "key", "id": "keys", "actions": keys }] }));
    }

    fn look(&self, width: u32, scheme: &str) {
        let phone = width < 500;
        let size = json!({ "width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": phone });
        self.raw("Emulation.setDeviceMetricsOverride", size);
        let feature = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.raw("Emulation.setEmulatedMedia", json!({ "features": feature }));
    }

    fn picture(&self, name: &str) {
        let Some(folder) = std::env::var_os("SCREENSHOTS") else { return };
        std::thread::sleep(Duration::from_millis(400)); // the bars grow
        let shot = self.raw("Page.captureScreenshot", json!({ "captureBeyondViewport": true }));
        use base64::Engine as _;
        let png = base64::prelude::BASE64_STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
        std::fs::write(Path::new(&folder).join(name), png).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // ends the browser, which would outlive its driver
        let _ = ask(self.address, "DELETE", &format!("/session{}", self.session), &[], &[]);
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

fn on_path(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    names.iter().find_map(|name| std::env::split_paths(&path).map(|folder| folder.join(name)).find(|f| f.is_file()))
}

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

const DONE: &str = "document.querySelector('article')?.dataset.state === 'done'";
const FAILED: &str = "document.querySelector('article')?.dataset.state === 'failed'";

#[test]
fn a_person_with_a_photograph() {
    let Some(browser) = Browser::open() else { return };
    let server = Server::start(&[]);
    let folder = tempfile::tempdir().unwrap();
    browser.look(900, "light");
    browser.visit(&server);
    browser.until("document.querySelector('#health').dataset.state === 'ready'");
    assert_eq!(browser.text("#health"), "server ready");

    // the keyboard's first stop is the file input, and it has a name
    browser.press("\u{e004}");
    assert_eq!(browser.value("document.activeElement.id"), "files");
    assert_eq!(browser.value("document.querySelector('#files').labels[0].textContent"), "choose images");

    // a dropped photograph: the right class with bars, times, model and command
    browser.drop_file(&project("tests/data/cat.jpg"));
    browser.until(DONE);
    assert_eq!(browser.text("article .predictions li:first-child .label"), "cat");
    assert_eq!(browser.text("article .predictions li:first-child .share"), "85.2 %");
    assert_eq!(browser.value("document.querySelectorAll('article .predictions li').length"), 5);
    let widths = "[...document.querySelectorAll('article .fill')].map(f => f.style.width)";
    let widths: Vec<f64> = serde_json::from_value::<Vec<String>>(browser.value(widths))
        .unwrap()
        .iter()
        .map(|w| w.trim_end_matches('%').parse().unwrap())
        .collect();
    assert!((widths[0] - 85.2).abs() < 0.5 && widths.is_sorted_by(|a, b| a >= b), "{widths:?}");
    let times = browser.text("article .times");
    for phase in ["decode", "resize", "queue", "inference", "network and rest", "in all"] {
        assert!(times.contains(phase), "{times}");
    }
    assert!(browser.text("article .who").contains("nf_regnet_cifar10, version 1"));
    let command = browser.content("article .curl code");
    let expected = format!("curl --data-binary @cat.jpg 'http://{}/v1/classify?", server.http);
    assert!(command.starts_with(&expected), "{command}");
    assert!(browser.text("#said").contains("cat.jpg: cat, 85.2 %"), "what a screen reader is told");
    browser.until("document.querySelector('article .thumb img').naturalWidth === 451");
    browser.picture("page.png");
    // the displayed command works
    let said = Command::new("sh").arg("-c").arg(&command).current_dir(project("tests/data")).output();
    if let Some(said) = said.ok().filter(|said| said.status.success()) {
        let said: Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(said["results"][0]["predictions"][0]["label"], "cat");
    }

    // a text file: an error that says so, and how to try again
    let text = folder.path().join("it's a note.txt");
    std::fs::write(&text, "not an image").unwrap();
    browser.choose(&[&text]);
    browser.until(FAILED);
    let error = browser.text("article .state");
    assert!(
        error.contains("not an image that the server can read") && error.contains("\nThe bytes are not"),
        "{error}"
    );
    let again = "document.querySelector('article .again').hidden";
    assert_eq!(browser.value(again), json!(true), "another try would not help");
    assert_eq!(browser.value("document.querySelector('article .predictions').hidden"), json!(true));

    // several at once, one of them pasted; in their order, above the earlier ones
    let photographs = ["ship", "horse", "truck"].map(|c| project(&format!("tests/data/cifar10/{c}/0000.jpg")));
    browser.choose(&photographs.each_ref().map(PathBuf::as_path));
    let done = "document.querySelectorAll('article[data-state=done]').length";
    browser.until(&format!("{done} === 4"));
    let firsts = "[...document.querySelectorAll('article .predictions li:first-child .label')].map(l => l.textContent)";
    assert_eq!(browser.value(firsts), json!(["ship", "horse", "truck", "cat"]));
    let bytes = data("cifar10/frog/0000.jpg");
    let paste = format!(
        "(() => {{ const held = new DataTransfer(); held.items.add(new File([new Uint8Array({bytes:?})], 'frog.jpg')); \
         document.dispatchEvent(new ClipboardEvent('paste', {{ clipboardData: held, bubbles: true }})); }})()"
    );
    browser.value(&paste);
    browser.until(&format!("{done} === 5"));
    assert_eq!(browser.text("article .predictions li:first-child .label"), "frog");

    // no resource from elsewhere, no overflow on a phone
    let hosts = "[...new Set(performance.getEntriesByType('resource').map(r => new URL(r.name).host))]";
    assert_eq!(browser.value(hosts), json!([server.http.to_string()]));
    for (width, scheme, name) in [(900, "light", "light.png"), (900, "dark", "dark.png"), (360, "light", "phone.png")] {
        browser.look(width, scheme);
        let scrolled = browser.value("document.documentElement.scrollWidth");
        assert!(scrolled.as_u64().unwrap() <= width.into(), "{name}: {scrolled}");
        browser.picture(name);
    }
    browser.look(900, "light");
    browser.value("document.querySelector('article .remove').click()");
    assert_eq!(browser.value("document.activeElement.className"), "remove", "focus must not fall off the page");
    browser.value("document.querySelector('#clear').click()");
    assert_eq!(browser.value("document.querySelectorAll('article').length"), 0);

    choosing_a_model(&browser, &server);

    drop(server);
    browser.choose(&[&text]);
    browser.until(FAILED);
    assert!(browser.text("article .state").contains("No answer came back"), "{}", browser.text("article .state"));
    assert_eq!(browser.value(again), json!(false), "another try may help");
}

/// The list of models is another server's, with a version that this one lacks.
fn choosing_a_model(browser: &Browser, server: &Server) {
    let list = "{ 'v2/models': { models: ['nf_regnet_cifar10', 'other'] }, \
                  'v2/models/nf_regnet_cifar10': { versions: ['1', '12', '7'] } }";
    let script = format!(
        "const real = fetch, lists = {list}; \
         window.fetch = (url, ...rest) => {{ \
           const path = new URL(url).pathname.slice(1); \
           return path in lists ? Promise.resolve(new Response(JSON.stringify(lists[path]))) : real(url, ...rest); }}"
    );
    let script = browser.raw("Page.addScriptToEvaluateOnNewDocument", json!({ "source": script }));
    browser.visit(server);
    browser.until("document.querySelector('#model').options.length > 0");
    let options = "[...document.querySelector('#model').options].map(o => o.textContent)";
    let all = ["nf_regnet_cifar10, newest", "version 12", "version 7", "version 1", "other"];
    let shown: Vec<String> = serde_json::from_value(browser.value(options)).unwrap();
    assert!(shown.len() == 5 && shown.iter().zip(all).all(|(s, a)| s.ends_with(a)), "{shown:?}");
    browser.choose(&[&project("tests/data/cat.jpg")]);
    browser.until(DONE);
    let pick = |i: usize| browser.pick(i);
    pick(1);
    browser.until(FAILED);
    let error = browser.text("article .state");
    assert!(error.contains("no longer has this model") && error.contains("version 12"), "{error}");
    browser.picture("error.png");
    pick(3);
    browser.until(DONE);
    assert!(browser.content("article .curl code").contains("version=1"), "{}", browser.content("article .curl code"));
    browser.raw("Page.removeScriptToEvaluateOnNewDocument", json!({ "identifier": script["identifier"] }));
    browser.visit(server);
    browser.until("document.querySelector('#health').dataset.state === 'ready'");
}

/// Nothing, the sample, six and two hundred images: what there is to see of each, and how many screens it takes.
#[test]
fn few_images_are_cards_and_many_are_tiles() {
    let Some(browser) = Browser::open() else { return };
    let server = Server::start(&[]);
    browser.look(900, "light");
    browser.visit(&server);
    browser.until("document.querySelector('#health').dataset.state === 'ready'");
    let shown = |name: &str| {
        for (width, scheme) in [(900, "light"), (900, "dark"), (360, "light")] {
            browser.look(width, scheme);
            let scrolled = browser.value("document.documentElement.scrollWidth").as_u64().unwrap();
            assert!(scrolled <= width.into(), "{name} {scheme}: {scrolled} of {width}");
            browser.picture(&format!("{name}-{scheme}-{width}.png"));
        }
        browser.look(900, "light");
    };
    // no image: the way in, the classes, no buttons for what is not there
    browser.until("!document.querySelector('#classes').hidden");
    assert_eq!(browser.text("#classes summary"), "the 10 classes that this model knows");
    assert_eq!(
        browser.value("document.querySelector('#all').hidden && document.querySelector('#progress').hidden"),
        json!(true)
    );
    shown("page-0");
    browser.value("document.querySelector('#classes summary').click()");
    browser.value("(document.querySelector('#filter').value = 'SHI', document.querySelector('#filter').dispatchEvent(new Event('input')))");
    assert_eq!(browser.value("[...document.querySelectorAll('#classes li')].map(l => l.textContent)"), json!(["ship"]));
    browser.value("document.querySelector('#classes summary').click()");
    let docs = browser.value("document.querySelector('footer a').href");
    assert_eq!(docs, json!(format!("http://{}/docs/", server.http)));
    // one: the sample that the server brings
    browser.value("document.querySelector('#sample').click()");
    browser.until(DONE);
    assert_eq!(browser.text("article .predictions li:first-child .label"), "cat");
    assert_eq!(
        browser.value("document.querySelector('article .curl').open"),
        json!(false),
        "the command is folded away"
    );
    shown("page-1");
    browser.value("document.querySelector('#clear').click()");
    // labels stand in the middle of their buttons
    let middle = "[...document.querySelectorAll('button, .button')].filter(b => b.offsetParent && b.textContent).every(b => { \
                  const r = document.createRange(); r.selectNodeContents(b); \
                  const [inner, outer] = [r.getBoundingClientRect(), b.getBoundingClientRect()]; \
                  return Math.abs(inner.top + inner.bottom - outer.top - outer.bottom) < 4 \
                    && Math.abs(inner.left + inner.right - outer.left - outer.right) < 4; })";
    assert_eq!(browser.value(middle), json!(true));
    let classes: Vec<PathBuf> =
        std::fs::read_dir(project("tests/data/cifar10")).unwrap().map(|e| e.unwrap().path()).collect();
    let mut files: Vec<PathBuf> = classes
        .iter()
        .filter(|folder| folder.is_dir())
        .flat_map(|folder| std::fs::read_dir(folder).unwrap().take(20).map(|e| e.unwrap().path()))
        .collect();
    files.sort();
    assert_eq!(files.len(), 200);
    let text = server.folder().join("note.txt");
    std::fs::write(&text, "not an image").unwrap();
    let six: Vec<&Path> = files.iter().step_by(40).map(PathBuf::as_path).chain([text.as_path()]).collect();
    browser.choose(&six);
    let over = "document.querySelectorAll('article[data-state=done], article[data-state=failed]').length";
    browser.until(&format!("{over} === 6"));
    assert_eq!(browser.value("document.querySelector('#results').classList.contains('compact')"), json!(false));
    shown("page-6");
    browser.value("document.querySelector('#clear').click()");
    // two hundred: progress moves, then all are tiles on three screens
    let moved = "window.moved = new Set(); new MutationObserver(() => window.moved.add(document.querySelector('#count').textContent)) \
                 .observe(document.querySelector('#count'), { childList: true })";
    browser.call("/execute/sync", json!({ "script": moved, "args": [] }));
    let mut many: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    many[7] = &text;
    browser.choose(&many);
    browser.until(&format!("{over} === 200"));
    let steps = browser.value("[...window.moved]");
    assert!(steps.as_array().unwrap().len() > 20, "{steps}");
    assert_eq!(browser.value("document.querySelector('#progress').hidden"), json!(true));
    assert!(browser.text("#said").contains("200 images are through, 1 of them failed"), "{}", browser.text("#said"));
    let height = browser.value("document.documentElement.scrollHeight").as_u64().unwrap();
    assert!(height <= 3000, "{height} pixels are more than three screens");
    shown("page-200");
    // a tile opens to what a card shows
    browser.value("document.querySelector('article[data-state=done] .details').click()");
    browser.until("document.querySelector('article.open .times').offsetHeight > 0");
    assert_eq!(browser.value("document.querySelector('article.open .predictions').children.length"), json!(5));
    browser.picture("page-200-open.png");
    // what is saved is what is shown
    let saved = browser.value(
        "(() => { const texts = []; const made = URL.createObjectURL; \
        URL.createObjectURL = blob => { texts.push(blob); return made.call(URL, blob); }; \
        document.querySelector('#csv').click(); document.querySelector('#json').click(); URL.createObjectURL = made; \
        window.saved = Promise.all(texts.map(t => t.text())); return texts.length; })()",
    );
    assert_eq!(saved, json!(2));
    let script = "const done = arguments[0]; window.saved.then(done)";
    let saved = browser.call("/execute/async", json!({ "script": script, "args": [] }));
    let (csv, list) = (saved[0].as_str().unwrap(), saved[1].as_str().unwrap());
    assert_eq!(csv.lines().count(), 1 + 199 * 5 + 1, "{csv}");
    assert!(csv.starts_with("file,model,version,rank,index,label,score,error\r\n"), "{csv}");
    assert!(csv.contains("note.txt,,,,,,,\"unsupported_media_type: "), "{csv}");
    let list: Value = serde_json::from_str(list).unwrap();
    let list = list.as_array().unwrap();
    assert_eq!((list.len(), &list[7]["error"]["code"]), (200, &json!("unsupported_media_type")));
    assert_eq!(list[0]["predictions"].as_array().unwrap().len(), 5);
    browser.look(360, "light");
    let scrolled = browser.value("document.documentElement.scrollWidth").as_u64().unwrap();
    assert!(scrolled <= 360, "{scrolled}");
}

/// `/docs`: "Try it out" sends a photograph, and shows what comes back.
#[test]
fn the_description_classifies_a_photograph() {
    let Some(browser) = Browser::open() else { return };
    let server = Server::start(&[]);
    browser.look(1200, "light");
    browser.call("/url", json!({ "url": format!("http://{}/docs/", server.http) }));
    browser.until("document.querySelector('#operations-Classification-classify .opblock-summary-control')");
    browser.value("document.querySelector('#operations-Classification-classify .opblock-summary-control').click()");
    browser.until("document.querySelector('#operations-Classification-classify .try-out__btn')");
    browser.value("document.querySelector('#operations-Classification-classify .try-out__btn').click()");
    // a list of React's is chosen from as a person does
    let option =
        "#operations-Classification-classify .body-param-content-type option[value='application/octet-stream']";
    browser.until(&format!("document.querySelector({option:?})"));
    let option = browser.call("/element", json!({ "using": "css selector", "value": option }));
    let option = option.as_object().unwrap().values().next().unwrap().as_str().unwrap();
    browser.call(&format!("/element/{option}/click"), json!({}));
    browser.until("document.querySelector('#operations-Classification-classify input[type=file]')");
    let input = browser.call(
        "/element",
        json!({ "using": "css selector", "value": "#operations-Classification-classify input[type=file]" }),
    );
    let id = input.as_object().unwrap().values().next().unwrap().as_str().unwrap();
    browser.call(&format!("/element/{id}/value"), json!({ "text": project("tests/data/cat.jpg") }));
    browser.value("document.querySelector('#operations-Classification-classify .execute').click()");
    let answer = "document.querySelector('#operations-Classification-classify .live-responses-table')?.innerText ?? ''";
    browser.until(&format!("({answer}).includes('\"cat\"')"));
    browser.picture("docs.png");
    let shown = browser.value(answer);
    assert!(shown.as_str().unwrap().contains("200"), "{shown}");
}

/// Every example of `/openapi.json` is answered.
#[test]
fn examples_of_the_description_run() {
    let server = Server::start(&[]);
    let api = server.get("/openapi.json").json();
    let mut ran = 0;
    for (path, item) in api["paths"].as_object().unwrap() {
        let content = item["post"]["requestBody"]["content"]["application/json"].clone();
        let name = content["schema"]["$ref"].as_str().and_then(|r| r.rsplit('/').next()).unwrap_or_default();
        let example = &api["components"]["schemas"][name]["example"];
        let schema = &api["components"]["schemas"][name];
        if example.is_null() || path.contains("explain") {
            continue;
        }
        assert!(schema["properties"].is_object(), "{name}");
        let target = path.replace("{model}", "nf_regnet_cifar10").replace("{version}", "1");
        let answer = server.post(&target, &[("content-type", "application/json")], example.to_string().as_bytes());
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        ran += 1;
    }
    assert!(ran >= 4, "{ran}");
    let described = |item: &Value| -> bool {
        let mut operations = item.as_object().unwrap().values();
        operations.all(|operation| {
            let mut responses = operation["responses"].as_object().unwrap().values();
            responses.all(|response| response["description"].as_str().is_some_and(|text| !text.is_empty()))
        })
    };
    assert!(api["paths"].as_object().unwrap().values().all(described), "which the specification wants");
    // bodies of bytes are files to whoever reads the description
    let content = &api["paths"]["/v1/classify"]["post"]["requestBody"]["content"];
    for kind in ["application/octet-stream", "image/jpeg", "image/png"] {
        assert_eq!(content[kind]["schema"]["format"], "binary", "{content}");
    }
    let form = &api["components"]["schemas"]["Form"]["properties"]["image"];
    assert_eq!((&form["type"], &form["items"]["format"]), (&json!("array"), &json!("binary")), "{form}");
}

/// Two models with two versions each: the list is the server's own, and the selected model answers.
#[test]
fn the_chooser_lists_what_is_served() {
    let Some(browser) = Browser::open() else { return };
    let folder = with_demo();
    let checkpoint = project("models/nf_regnet_cifar10").display().to_string();
    for (name, version, size) in
        [("nf_regnet_cifar10", "2", "32"), ("large_pictures", "1", "64"), ("large_pictures", "10", "96")]
    {
        let flags = ["fold", &checkpoint, "--name", name, "--model-version", version, "--size", size];
        assert!(nfold(&flags, folder.path()).status.success());
    }
    let server = Server::start_in(folder, &["--workers", "1", "--elastic-threads", "0"]);
    browser.look(900, "light");
    browser.visit(&server);
    browser.until("!document.querySelector('#chooser').hidden");
    let options = "[...document.querySelector('#model').options].map(o => o.textContent)";
    let shown: Vec<String> = serde_json::from_value(browser.value(options)).unwrap();
    let all = ["newest", "version 10", "version 1"].map(|v| format!("large_pictures, {v}"));
    let all = [all, ["newest", "version 2", "version 1"].map(|v| format!("nf_regnet_cifar10, {v}"))].concat();
    assert_eq!(shown, all);
    assert_eq!(browser.value("document.querySelector('#model').labels[0].textContent"), "Model");

    browser.choose(&[&project("tests/data/cat.jpg"), &project("tests/data/cifar10/ship/0000.jpg")]);
    let mut answers = std::collections::BTreeSet::new();
    for (index, title) in all.iter().enumerate() {
        if index > 0 {
            browser.pick(index);
        }
        let (name, version) = title.split_once(", ").unwrap();
        let version = match (version.strip_prefix("version "), name) {
            (Some(version), _) => version,
            (None, "large_pictures") => "10",
            (None, _) => "2",
        };
        // both images are asked again
        let who = format!("answered by {name}, version {version}");
        let answered = "[...document.querySelectorAll('article[data-state=done] .who')].map(w => w.textContent)";
        browser.until(&format!("{answered}.filter(w => w === {who:?}).length === 2"));
        let command = browser.content("article .curl code");
        assert!(command.contains(&format!("model={name}")), "{command}");
        assert_eq!(command.contains("version="), title.contains("version"), "{command}");
        answers.insert(browser.text("article .predictions li:first-child .share"));
    }
    assert!(answers.len() > 1, "other sizes give other probabilities: {answers:?}");
    for (width, scheme, name) in [
        (900, "light", "chooser.png"),
        (900, "dark", "chooser-dark.png"),
        (360, "light", "chooser-phone.png"),
        (360, "dark", "chooser-phone-dark.png"),
    ] {
        browser.look(width, scheme);
        let scrolled = browser.value("document.documentElement.scrollWidth");
        assert!(scrolled.as_u64().unwrap() <= width.into(), "{name}: {scrolled}");
        browser.picture(name);
    }
}

/// The page of a server that needs a key asks for it, retries, and forgets it with the tab.
#[test]
fn a_person_with_a_key() {
    let Some(browser) = Browser::open() else {
        crate::cli::skip("no chromium with chromedriver here (make tools)");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    let key = "a-key-that-is-long-enough";
    std::fs::write(&file, key).unwrap();
    let server = Server::start(&["--api-key-file", file.to_str().unwrap()]);
    browser.look(900, "light");
    browser.visit(&server);
    let asked = "!document.querySelector('#lock').hidden";
    browser.until(asked);
    assert_eq!(browser.text("#lock-help"), "This server asks for an API key.");
    assert_eq!(browser.value("document.querySelector('#key').labels[0].textContent"), "API key");
    browser.choose(&[&project("tests/data/cat.jpg")]);
    browser.until(FAILED);
    assert!(browser.text("article .state").contains("asks for an API key"), "{}", browser.text("article .state"));
    browser.picture("key.png");
    let unlock = |key: &str| {
        browser.value("document.querySelector('#key').focus()");
        browser.raw("Input.insertText", json!({ "text": key }));
        browser.press("\u{e007}");
    };
    unlock("not-a-key-of-the-server");
    browser.until("document.querySelector('#lock-help').textContent.includes('does not know this key')");
    browser.until(FAILED);
    unlock("\u{43a}\u{43b}\u{44e}\u{447}");
    browser.until("document.querySelector('#lock-help').textContent.includes('letters, digits and signs')");
    browser.value("document.querySelector('#key').value = ''");
    unlock(key);
    browser.until(DONE);
    assert_eq!(browser.text("article .predictions li:first-child .label"), "cat");
    assert_eq!(browser.value(asked), json!(false));
    browser.until("!document.querySelector('#chooser').hidden");
    assert_eq!(browser.value("document.activeElement.id"), "files", "focus must not fall off the page");
    let command = browser.content("article .curl code");
    assert!(command.contains("-H 'authorization: Bearer KEY'") && !command.contains(key), "{command}");
    // kept for this tab only, and nowhere that the page shows
    assert_eq!(browser.value("[localStorage.length, sessionStorage.length, document.cookie]"), json!([0, 1, ""]));
    assert_eq!(browser.value(&format!("document.documentElement.outerHTML.includes('{key}')")), json!(false));
    browser.visit(&server);
    browser.until("!document.querySelector('#chooser').hidden");
    browser.choose(&[&project("tests/data/cat.jpg")]);
    browser.until(DONE);
    assert_eq!(browser.value(asked), json!(false));
}

#[test]
fn the_page_may_load_and_call_only_this_server() {
    let server = Server::start(&[]);
    for path in ["/docs/", "/docs/swagger-ui-bundle.js", "/docs/swagger-initializer.js"] {
        let answer = ask(server.http, "GET", path, &[], &[]).unwrap();
        let headers =
            ["content-security-policy", "x-content-type-options", "referrer-policy"].map(|h| answer.header(h));
        assert!(headers[0].is_some_and(|p| p.starts_with("default-src 'none'") && p.contains("script-src 'self';")));
        assert_eq!((answer.status, &headers[1..]), (200, &[Some("nosniff"), Some("no-referrer")][..]), "{path}");
    }
    for (path, kind) in [("/", "text/html"), ("/page/page.css", "text/css"), ("/page/page.js", "text/javascript")] {
        let answer = ask(server.http, "GET", path, &[], &[]).unwrap();
        assert_eq!(answer.status, 200);
        assert!(answer.header("content-type").is_some_and(|k| k.starts_with(kind)), "{answer:?}");
        assert!(answer.header("content-security-policy").is_some_and(|p| p.starts_with("default-src 'none'")));
        assert!(!answer.body.contains("://") && !answer.body.contains("innerHTML"), "{path} names another place");
    }
    assert_eq!(ask(server.http, "POST", "/", &[], b"x").unwrap().status, 405);
}

/// `/docs` works under its content security policy.
#[test]
fn the_documentation_shows_its_routes() {
    let Some(browser) = Browser::open() else { return };
    let server = Server::start(&[]);
    browser.call("/url", json!({ "url": format!("http://{}/docs/", server.http) }));
    browser.until("document.querySelectorAll('.opblock').length > 5");
}

/// A page of an allowed origin sends requests with its key; one of another origin can't read responses.
#[test]
fn a_page_of_another_origin_with_a_key() {
    let Some(browser) = Browser::open() else { return };
    let (allowed, other) = (Server::start(&[]), Server::start(&[]));
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys");
    std::fs::write(&keys, "a-key-that-is-long-enough").unwrap();
    let origin = format!("http://{}", allowed.http);
    let server = Server::start(&["--cors-origin", &origin, "--api-key-file", keys.to_str().unwrap()]);
    let script = format!(
        "fetch('http://{}/v2', {{ headers: {{ authorization: 'Bearer a-key-that-is-long-enough', 'x-request-id': 'mine' }} }})
            .then(answer => answer.json().then(body => body.name + ' ' + answer.headers.get('x-request-id')))
            .catch(error => 'refused: ' + error)",
        server.http
    );
    // documents without a policy of their own
    for (page, said) in [(&allowed, "nfold mine"), (&other, "refused: TypeError: Failed to fetch")] {
        browser.call("/url", json!({ "url": format!("http://{}/v2", page.http) }));
        assert_eq!(browser.value(&script), said);
    }
}

/// Of a model with the output `map`, a button lays over the photograph where its class is seen, with a scale.
#[test]
fn a_button_shows_where_a_class_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let demo = project("models/nf_regnet_cifar10").display().to_string();
    let flags = ["--outputs", "logits,features,map"];
    let output = nfold(&[&["fold", demo.as_str()], &flags[..]].concat(), folder.path());
    assert!(output.status.success(), "{output:?}");
    let server = Server::start_in(folder, &[]);
    let Some(browser) = Browser::open() else { return };
    browser.visit(&server);
    browser.until("document.querySelector('#model').options.length > 0");
    browser.choose(&[&project("tests/data/cat.jpg")]);
    browser.until(DONE);
    assert_eq!(browser.value("document.querySelector('article .where').hidden"), json!(false));
    assert_eq!(browser.value("document.querySelector('article .heat').hidden"), json!(true));
    browser.value("document.querySelector('article .where').click()");
    browser.until("document.querySelector('article .heat img').naturalWidth === 64");
    browser.until("!document.querySelector('article .heat').hidden");
    let scale = browser.text("article .heat .most");
    assert!(scale.ends_with(" for cat") && scale.starts_with(|c: char| c.is_ascii_digit()), "{scale}");
    browser.picture("heat.png");
    browser.value("document.querySelector('article .where').click()");
    assert_eq!(browser.value("document.querySelector('article .heat').hidden"), json!(true), "and takes it away");
}
